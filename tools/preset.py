"""Write a preset over params.yaml: the shipped settings with what the preset changes.

    python -m tools.preset NAME     of presets/NAME.yaml; `default` gives back the shipped settings

Other programs read a preset where it is: `python -m lm.plan --params presets/NAME.yaml`.
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
# a section's own line, or a key with the lines of its value; and the blank line before a section
PART = re.compile(r"^\n?(\w+):\n|^  (\w+):.*\n(?:  [- ].*\n)*", re.M)


def whole(preset: Path) -> str:
    """Return the text of a complete params.yaml, with the comment on top of the preset.

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
    """Yield ((section, key), lines) in order; a section's own line has the key ""."""
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
        say(f"{PARAMS}: the settings of {preset}")


if __name__ == "__main__":
    main()
