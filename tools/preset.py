"""Write a preset to params.yaml: the shipped settings with the changes of the preset.

    python -m tools.preset NAME     take presets/NAME.yaml; `default` restores the shipped settings

Other commands read a preset directly: `python -m lm.plan --params presets/NAME.yaml`.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from lm.base.console import say
from lm.base.errors import InputError, one_line_errors
from lm.base.files import atomic_write
from lm.base.params import load_params, parse_yaml
from lm.base.paths import PARAMS

PRESETS = Path("presets")
# the line of a section and a blank line before it, or a key with the lines of its value
PART = re.compile(r"^\n?(\w+):\n|^  (\w+):.*\n(?:  [- ].*\n)*", re.M)


def whole(preset: Path) -> str:
    """Return the text of a complete params.yaml, with the comment at the preset's top.

    Raises InputError for a preset in another style than DVC's own, as `model: {d_model: 64}`.
    """
    settings = load_params(preset)
    text = preset.read_text(encoding="utf-8")
    if not (extends := re.search(r"^extends: (.*)\n", text, re.M)):
        return text
    base = (preset.parent / extends[1]).read_text(encoding="utf-8")
    changes = dict(_values(text))
    body = "".join(changes.get(key, lines) for key, lines in _values(base))
    result = f"{text[: extends.start()].strip()}\n{body}".lstrip()
    if parse_yaml(result, str(preset)) != settings:
        raise InputError(f"{preset}: write one key a line, as presets/smoke.yaml does")
    return result


def _values(text: str) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield ((section, key), lines) in order; the line of a section has the key ""."""
    section = ""
    for match in PART.finditer(text):
        section = match[1] or section
        yield (section, match[2] or ""), match[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    what = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tools.preset", description=what)
    names = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    parser.add_argument("name", choices=names, metavar="NAME", help=", ".join(names))
    name = parser.parse_args(arguments).name
    with one_line_errors():
        preset = PRESETS / f"{name}.yaml"
        atomic_write(PARAMS, whole(preset).encode())
        say(f"{PARAMS} now has the settings of {preset}")


if __name__ == "__main__":
    main()
