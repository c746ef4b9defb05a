"""Bundle Vega, Vega-Lite and Vega-Embed into one script for pages that load nothing."""

from importlib.metadata import version

import vl_convert

from lm.base.files import atomic_write
from stages.run import SCRATCH

VEGA_LITE = "6.4"  # version 6, as the $schema of .dvc/plots/curve.json says


def script() -> str:
    """Return the script that defines vegaEmbed; keep it, because bundling takes a second."""
    kept = SCRATCH / f"vega-lite-{VEGA_LITE}-by-{version('vl-convert-python')}.js"
    if not kept.exists():
        bundle = vl_convert.javascript_bundle(
            "window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE
        ).replace("</script", "<\\/script")
        atomic_write(kept, f'(() => {{ "use strict"; {bundle} }})();'.encode())
    return kept.read_text()
