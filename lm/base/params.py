"""Read params.yaml or a preset, and the overrides of a command line, as nested dicts.

params.yaml --load_params, -S key=value--> dict --read_section--> TrainSection(...)
"""

import argparse
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from lm.base.errors import InputError
from lm.base.sections import brief, suggest

MAX_BYTES = 1 << 18  # of params.yaml: parsing as much takes seconds
SECTIONS = ("corpus", "data", "tokenizer", "model", "train", "evaluate", "export", "runtime")
RENAMED = {  # settings that have moved: old name, new name
    "data.source": "corpus.source",
    "data.packages": "corpus.packages",
    "data.grammar_bytes": "corpus.grammar_bytes",
}


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the option -S; its values are the `overrides` of load_params."""
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
                f"{path}: extends {base}, which does not exist; a preset names only what differs "
                "from that file: run `make preset NAME=...` to write a complete params.yaml"
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
        raise InputError(f"{path}: longer than {MAX_BYTES:,} bytes; keep only settings in it")
    try:
        params = parse_yaml(raw.decode(), str(path))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at offset {error.start}") from None
    if not isinstance(params, dict):
        raise InputError(f"{path}: holds no sections; expected {', '.join(SECTIONS)}")
    return params


def _require_sections(params: dict[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """Return `params`. Raise InputError for an unknown section or one without keys."""
    for name, section in params.items():
        if name not in SECTIONS:
            raise InputError(f"{path}: unknown section {brief(name)}{suggest(name, SECTIONS)}")
        if not isinstance(section, dict):
            raise InputError(f"{path}: section {name} holds no keys")
    for key, _ in _keys(params):
        if key in RENAMED:
            raise InputError(f"{path}: {key} is called {RENAMED[key]} now; move it there")
    return params


def _replace(params: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set a key, spelt with dots, to another value. Raise InputError if it does not exist."""
    known = dict(_keys(params))
    if key not in known:
        raise InputError(f"{where}: unknown key {brief(key)}{suggest(key, known)}")
    known[key][key.rpartition(".")[2]] = value


def _keys(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each key below the first level, spelt with dots, and the dict in which it stands."""
    for key, value in values.items():
        if prefix:
            yield f"{prefix}{key}", values
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")


# --- YAML 1.2 scalars -------------------------------------------------------------------
# PyYAML follows YAML 1.1, where 1e-3 and DVC's own 2e-05 are text, yes is true and 0777 is
# octal. DVC reads YAML 1.2. This loader reads what DVC writes, and nothing unsafe. It refuses
# text that DVC reads as a number or a date and other readers do not.


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML declares it so

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor or event.tag:
            # aliases of aliases can fill the memory, and a tag can ask for any Python type
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
                raise yaml.YAMLError(f"{line}: key {brief(key)} is not text")
            if key in keys:
                raise yaml.YAMLError(f"{line}: key {brief(key)} stands twice")
            keys.add(key)
        return super().construct_mapping(node, deep)

    def refuse_ambiguous(self, node: Any) -> None:
        raise yaml.YAMLError(
            f"line {node.start_mark.line + 1}: {brief(node.value)} is ambiguous; write a plain "
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
    ("int", r"[-+]?(0|[1-9]\d{,99})", list("-+0123456789")),  # Python converts no longer ones
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
    """Return the value of an option -S; where DVC's own -S accepts it, both read the same.

    Lists, mappings and quoted text are read as YAML; DVC reads them by Hydra's grammar. All else
    is a number, true, false, null or text. Raises InputError for a backslash in double
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
