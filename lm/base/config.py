"""Settings: one section of params.yaml becomes one frozen dataclass, strict and typed.

    params.yaml --load_params--> dict --(-S key=value)--> dict --read_section--> TrainConfig(...)

A dataclass has no defaults, because DVC cannot see a default that lives in code: every
setting stands in params.yaml. An annotation holds the type, bounds and the description, from
which `python -m tools.settings` makes docs/SETTINGS.md:

    lr: Annotated[float, POSITIVE, "peak learning rate of AdamW"]
"""

import argparse
import ast
import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from lm.base.errors import InputError

Config = TypeVar("Config")
ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Bound:
    """A condition on a value and the words that state it."""

    holds: Callable[[Any], bool]
    text: str


def key_of(file: str, registry: str) -> Bound:
    """Return the bound "a key of this dict", as of ACTIVATIONS in lm/model/activations.py.

    The file is parsed, not imported: settings are checked before torch is loaded, and by stages
    that do not depend on the file.
    """
    tree = ast.parse((ROOT / file).read_text())
    (found,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == registry
    )
    assert isinstance(found, ast.Dict)
    keys = [key.value for key in found.keys if isinstance(key, ast.Constant)]
    return Bound(lambda x: x in keys, f"must be one of {', '.join(map(str, keys))}")


POSITIVE = Bound(lambda x: x > 0, "must be > 0")
NOT_NEGATIVE = Bound(lambda x: x >= 0, "must be >= 0")
AT_LEAST_ONE = Bound(lambda x: x >= 1, "must be >= 1")
BELOW_ONE = Bound(lambda x: 0 <= x < 1, "must be in [0, 1)")
UP_TO_ONE = Bound(lambda x: 0 <= x <= 1, "must be in [0, 1]")
ABOVE_ZERO_UP_TO_ONE = Bound(lambda x: 0 < x <= 1, "must be in (0, 1]")
NOT_EMPTY = Bound(lambda x: len(x) > 0, "must not be empty")
INSIDE_ONE = Bound(lambda x: 0 < x < 1, "must be in (0, 1)")
SEED = Bound(lambda x: 0 <= x < 2**63, "must be in [0, 2**63)")

UP_TO_1024 = Bound(lambda x: 1 <= x <= 1024, "must be in [1, 1024]")
BELOW_2_31 = Bound(lambda x: x < 2**31, "must be < 2**31")  # what torch counts with

Count = Annotated[int, AT_LEAST_ONE, BELOW_2_31]


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """The section `runtime`: where and how visibly to run. No DVC stage depends on it."""

    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], "auto: CUDA, else MPS, else CPU"]
    log_interval: Annotated[Count, "steps between two lines on the console"]
    checkpoint_interval: Annotated[Count, "steps between two checkpoints"]
    keep_checkpoints: Annotated[
        int, Bound(lambda x: x >= 2, "must be >= 2"), "of an unfinished run"
    ]
    num_workers: Annotated[
        Annotated[int, UP_TO_1024] | None, "processes that prepare data; null: one a core"
    ]
    num_processes: Annotated[
        int, UP_TO_1024, "processes that train, on this machine; `torchrun` says it instead"
    ]
    process_timeout_s: Annotated[
        Count,
        "a process that the others have awaited for longer counts as hung; with `num_processes` "
        "also the time to save after a signal",
    ]


MAX_BYTES = 1 << 18  # of params.yaml: reading as much takes seconds
SECTIONS = ("corpus", "data", "tokenizer", "model", "train", "evaluate", "export", "runtime")
RENAMED = {  # settings that have moved: a line each
    "data.source": "corpus.source",
    "data.packages": "corpus.packages",
    "data.grammar_bytes": "corpus.grammar_bytes",
}


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the option -S, the `overrides` of load_params."""
    parser.add_argument(
        "-S",
        dest="overrides",
        action="append",
        default=[],
        metavar="section.key=value",
        help="override a setting of params.yaml; can be repeated",
    )


def load_params(path: Path, overrides: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Return params.yaml, or a preset, as nested dicts with `section.key=value` overrides applied.

    A preset says `extends: FILE` and names only what differs from that file, which lies beside it.

    Raises InputError for a file that is missing or malformed and for an override of a key
    that the file does not have.
    """
    params = _parse_file(path)
    if "extends" in params:
        base = path.parent / str(params.pop("extends"))
        if not base.is_file():
            raise InputError(
                f"{path}: extends {base}, which is not there; a preset names only what differs: "
                "`make preset NAME=...` writes a complete params.yaml from it"
            )
        changes, params = _require_sections(params, path), _parse_file(base)
        _require_sections(params, base)
        for section, keys in changes.items():
            for key, value in keys.items():
                _replace(params, f"{section}.{key}", value, str(path))
    _require_sections(params, path)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not (equals and "." in key):
            raise InputError(f"-S {override}: expected section.key=value, as in -S train.lr=1e-3")
        if key in RENAMED:
            raise InputError(f"-S {override}: {key} is called {RENAMED[key]} now")
        _replace(params, key, _override(text.strip(), f"-S {override}"), f"-S {override}")
    return params


def _parse_file(path: Path) -> dict[str, Any]:
    """Return the keys and values of a YAML file."""
    if not path.is_file():
        problem = "not a file" if path.exists() else "no such file"
        raise InputError(f"{path}: {problem}; run from the project's root folder")
    with open(path, "rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise InputError(f"{path}: longer than {MAX_BYTES:,} bytes; settings are short")
    try:
        params = parse_yaml(raw.decode(), str(path))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at offset {error.start}") from None
    if not isinstance(params, dict):
        raise InputError(f"{path}: holds no sections; expected {', '.join(SECTIONS)}")
    return params


def _require_sections(params: dict[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """Return `params`. Raise InputError for an unknown section and for one without keys."""
    for name, section in params.items():
        if name not in SECTIONS:
            raise InputError(f"{path}: unknown section {_brief(name)}{_suggest(name, SECTIONS)}")
        if not isinstance(section, dict):
            raise InputError(f"{path}: section {name} holds no keys")
    for key, _ in _keys(params):
        if key in RENAMED:
            raise InputError(f"{path}: {key} is called {RENAMED[key]} now; move it there")
    return params


def _replace(params: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set a key, spelt with dots, to another value. Raise InputError if it is not there."""
    known = dict(_keys(params))
    if key not in known:
        raise InputError(f"{where}: unknown key {_brief(key)}{_suggest(key, known)}")
    known[key][key.rpartition(".")[2]] = value


def _keys(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each key below the first level, spelt with dots, and the dict in which it stands."""
    for key, value in values.items():
        if prefix:
            yield f"{prefix}{key}", values
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")


def read_section(
    kind: type[Config],
    params: Mapping[str, Mapping[str, Any]],
    name: str,
    where: str = "params.yaml",
    **derived: Any,
) -> Config:
    """Return section `name` as the dataclass `kind`; `derived` values are not set by the user.

    Raises InputError naming the key for an unknown or missing key, a wrong type, a value out
    of bounds, and for whatever the dataclass itself refuses in __post_init__.
    """
    try:
        if name not in params:
            raise InputError(f"missing section {name}")
        if not isinstance(params[name], Mapping):
            raise InputError(f"section {name} holds no keys")
        for key in derived.keys() & params[name].keys():
            raise InputError(f"unknown key {name}.{key}: it is derived, not set; take it out")
        return _build(kind, {**params[name], **derived}, name)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _build(kind: type[Config], values: Mapping[str, Any], section: str) -> Config:
    hints = get_type_hints(kind, include_extras=True)
    for key in values:
        if key not in hints:
            suggestion = _suggest(f"{section}.{key}", [f"{section}.{name}" for name in hints])
            raise InputError(f"unknown key {_brief(f'{section}.{key}')}{suggestion}")
    for key in hints:
        if key not in values:
            raise InputError(f"missing key {section}.{key}")
    return kind(**{key: _convert(values[key], hints[key], f"{section}.{key}") for key in hints})


def _convert(value: Any, hint: Any, key: str) -> Any:
    """Return `value` as the type `hint`. Raise InputError: key = value, what is wrong with it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        value = _convert(value, arguments[0], key)
        for bound in arguments[1:]:
            if isinstance(bound, Bound) and not bound.holds(value):
                raise InputError(f"{key} = {_brief(value)}: {bound.text}")
        return value
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        inner, _ = arguments  # the other one is None
        return None if value is None else _convert(value, inner, key)
    if origin is Literal:
        if not any(type(value) is type(word) and value == word for word in arguments):
            choice = ", ".join(str(a).lower() if type(a) is bool else a for a in arguments)
            raise InputError(f"{key} = {_brief(value)}: must be one of {choice}")
        return value
    wanted: Any = dict if dataclasses.is_dataclass(hint) else origin or hint
    if wanted is float and type(value) is int:
        value = float(value) if abs(value) < 1e300 else math.inf
    if type(value) is not wanted:
        raise InputError(f"{key} = {_show(value)}, wanted {_TYPE_NAMES[wanted]}")
    if wanted is float and not math.isfinite(value):
        raise InputError(f"{key} = {value}: must be finite")
    if origin is list:
        return [_convert(item, arguments[0], f"{key}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        return {name: _convert(item, arguments[1], f"{key}.{name}") for name, item in value.items()}
    return _build(hint, value, key) if wanted is dict else value


_TYPE_NAMES = {
    float: "a number", int: "an integer", bool: "true or false", str: "text",
    list: "a list", dict: "keys and values",
}  # fmt: skip


def _show(value: Any) -> str:
    kinds = {bool: "a boolean", str: "text", float: "a decimal", int: "a number", list: "a list"}
    if value is None:
        return "null"
    return f"{_brief(repr(value))} is {kinds.get(type(value), 'a ' + type(value).__name__)}"


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _suggest(word: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]}?)" if match else ""


# --- YAML 1.2 scalars -------------------------------------------------------------------
# PyYAML follows YAML 1.1, where 1e-3 and DVC's own 2e-05 are text, yes is true and 0777 is
# octal. DVC reads YAML 1.2. This loader reads what DVC writes, and nothing unsafe. It refuses
# what DVC takes for a number or a date and other readers do not.


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML declares it so

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor or event.tag:
            # an alias of aliases of aliases is a bomb, and a tag asks for a Python type
            raise yaml.YAMLError(
                f"line {event.start_mark.line + 1}: anchors, aliases and tags are not supported"
            )
        return super().compose_node(parent, index)

    def construct_scalar(self, node: Any) -> Any:
        text = super().construct_scalar(node)
        if isinstance(text, str) and re.search(r"[\ud800-\udfff]", text):  # has no UTF-8
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"line {line}: half a surrogate pair; write the character itself")
        return text

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = f"line {key_node.start_mark.line + 1}"
            if not isinstance(key, str):
                raise yaml.YAMLError(f"{line}: key {_brief(key)} is not text")
            if key in keys:
                raise yaml.YAMLError(f"{line}: key {_brief(key)} stands twice")
            keys.add(key)
        return super().construct_mapping(node, deep)

    def refuse_ambiguous(self, node: Any) -> None:
        raise yaml.YAMLError(
            f"line {node.start_mark.line + 1}: {_brief(node.value)} is ambiguous; write a plain "
            "decimal number, or quote it if it is text"
        )


_FLOAT = (
    r"[-+]?((0|[1-9]\d*)(\.\d*([eE][-+]?\d+)?|[eE][-+]?\d+)|\.\d+([eE][-+]\d+)?|\.(inf|Inf|INF))"
    r"|\.(nan|NaN|NAN)"
)
_AMBIGUOUS = (  # other texts that DVC, by ruamel.yaml, reads as a number or a date
    r"[-+]?(0b[01_]+|0o[0-7_]+|0x[\da-fA-F_]+|[\d_]+|\d[\d_]*(\.[\d_]*)?([eE][-+]?\d+)?)"
    r"|[-+]?\.[\d_]+([eE][-+]\d+)?|\d{4}-\d\d-\d\d|\d{4}-\d\d?-\d\d?([Tt]|[ \t]+)\d\d?:\d\d:\d\d"
    r"(\.\d*)?([ \t]*(Z|[-+]\d\d?(:\d\d)?))?"
)
for _tag, _pattern, _first in (  # the first match counts
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9]\d{,99})", list("-+0123456789")),  # Python converts no endless ones
    ("float", _FLOAT, list("-+.0123456789")),
    ("ambiguous", _AMBIGUOUS, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$", re.ASCII), _first
    )
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor(
    "tag:yaml.org,2002:float",
    lambda loader, node: float(re.sub(r"\.(?=inf|nan)", "", node.value.lower())),
)
_Loader.add_constructor("tag:yaml.org,2002:ambiguous", _Loader.refuse_ambiguous)


def _override(text: str, where: str) -> Any:
    """Return the value of an option -S, as DVC's own -S reads it where both accept it.

    Lists, mappings and quoted text are YAML, as they are Hydra's grammar, which DVC reads. All
    else is a number, true, false, null or text. Raises InputError for a backslash in double
    quotes: DVC reads a backslash, YAML an escape.
    """
    if not text:
        return ""
    if text[0] in "[{'\"":
        if '"' in text and re.search(r'\\(?!")', text):
            raise InputError(
                f"{where}: a backslash in double quotes means one text to DVC and another to YAML; "
                "write the value into params.yaml"
            )
        return parse_yaml(text, where)
    loader, here = _Loader(""), yaml.Mark(where, 0, 0, 0, "", 0)
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    try:
        return loader.construct_object(yaml.ScalarNode(tag, text, here, here))
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not valid YAML: {error}") from None


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of a YAML text, with scalars of YAML 1.2. Raises InputError."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of SafeLoader
    except yaml.YAMLError as error:
        problem = str(error).replace(' in "<unicode string>",', "")
        raise InputError(f"{where}: not valid YAML: {' '.join(problem.split())}") from None
    except RecursionError:
        raise InputError(f"{where}: not valid YAML: nested too deeply") from None
