"""Write docs/SETTINGS.md: type, range, default, meaning and readers of each setting.

    python -m tools.settings    after you added, changed or redescribed a setting

Types, bounds and descriptions come from the annotations of the dataclasses, defaults from
params.yaml. The command also copies params.yaml to presets/default.yaml, which the other presets
extend, so run it only while params.yaml holds the defaults.
"""

import json
import re
import sys
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from lm.base.console import differences
from lm.base.files import atomic_copy, atomic_write
from lm.base.params import load_params
from lm.base.sections import AT_LEAST_ONE, BELOW_2_31, Bound
from lm.base.settings import CorpusConfig, EvaluateConfig, ModelConfig, RuntimeConfig, TrainSection
from lm.data.tokenizer import TokenizerConfig
from lm.export.card import ExportConfig
from lm.prepare.sources import DataConfig
from stages import ROOT

PAGE, DEFAULTS = ROOT / "docs" / "SETTINGS.md", ROOT / "presets" / "default.yaml"
KINDS = {
    "corpus": CorpusConfig,
    "data": DataConfig,
    "tokenizer": TokenizerConfig,
    "model": ModelConfig,
    "train": TrainSection,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "runtime": RuntimeConfig,
}
READ_RUNTIME = {"device": "train, evaluate", "num_workers": "tokenizer, tokens"}  # else: train
HEAD = """# Settings

For those who edit `params.yaml`: every setting with its type and range, its default and what it
does. `python -m tools.settings` makes this page from the code.

The last column names the stages that read a setting. A change runs them again, and later stages if
their inputs changed. `runtime` is the exception: a change of it never runs a stage again. A *count*
is a whole number from 1 to 2³¹ - 1.

`params.yaml` is YAML without anchors, aliases and tags. Quote a text that looks like a number or a
date, such as "0777", "1_000" or "2026-01-01", because YAML readers disagree about it.
"""
NAMES = {int: "integer", float: "number", bool: "true, false", str: "text"}


def page() -> str:
    """Return the page. Raises KeyError for a setting without a description."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    lines = [HEAD]
    for section, values in load_params(DEFAULTS).items():
        lines += [
            f"## {section}\n",
            "| setting | type and range | default | what it does | read by |",
        ]
        lines += ["|---|---|---|---|---|"]
        hints = get_type_hints(KINDS[section], include_extras=True)
        for key, default in values.items():
            what = [word for word in get_args(hints[key]) if isinstance(word, str)]
            if get_origin(hints[key]) is not Annotated or not what:
                raise KeyError(f"{section}.{key}: no description; put one into its Annotated")
            name, words = f"{section}.{key}", re.sub(r"docs/(\w+\.md)", r"[\1](\1)", what[-1])
            read_by = [stage for stage in stages if {section, name} & {*stages[stage]["params"]}]
            cells = [f"`{name}`", allowed(hints[key]), f"`{_yaml(default)}`", words]
            cells += [", ".join(read_by) or READ_RUNTIME.get(key, "train")]
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def allowed(hint: Any) -> str:
    """Return type and range of an annotation in words, such as "number > 0, null"."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = [bound for bound in arguments[1:] if isinstance(bound, Bound)]
        words = allowed(arguments[0])
        if bounds[:2] == [AT_LEAST_ONE, BELOW_2_31]:
            words, bounds = "count", bounds[2:]
        if choices := re.fullmatch("must be one of (.*)", bounds[0].text) if bounds else None:
            return choices[1]
        return words + "".join(map(_condition, bounds))
    if origin in (Union, UnionType):
        return ", ".join(map(allowed, arguments))
    if hint is NoneType:
        return "null"
    if origin is Literal:
        return ", ".join(map(_yaml, arguments))
    if origin is list:
        return f"list of {allowed(arguments[0])}"
    if origin is dict:
        hints = get_type_hints(arguments[1], include_extras=True)
        return f"name: {{{'; '.join(f'{key}: {allowed(hints[key])}' for key in hints)}}}"
    return NAMES[hint]


def _condition(bound: Bound) -> str:
    text = bound.text.replace("must not be", "not").removeprefix("must be ")
    text = text.removesuffix(", or null").replace("2**63", "2⁶³")  # null comes last in the cell
    return f" {text}" if text.startswith((">", "<", "in ")) else f", {text}"


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    shipped, now = load_params(DEFAULTS), load_params(ROOT / "params.yaml")
    for section, values in now.items():
        for key, how in differences(shipped.get(section, {}), values).items():
            sys.stdout.write(f"{DEFAULTS.name}: {section}.{key} ({how})\n")
    atomic_copy(ROOT / "params.yaml", DEFAULTS)
    atomic_write(PAGE, page().encode())
