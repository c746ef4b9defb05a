"""Turn a section of settings into its frozen dataclass, and check every type and bound.

The dataclasses have no defaults, because DVC cannot see a default in code: every setting stands
in params.yaml. An annotation holds the type, the bounds and the description;
`python -m tools.settings` makes docs/SETTINGS.md from them:

    lr: Annotated[float, POSITIVE, "peak learning rate of AdamW"]
"""

import ast
import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lm.base.errors import InputError

Config = TypeVar("Config")
ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Bound:
    """A condition on a value, and its words for a message."""

    holds: Callable[[Any], bool]
    text: str


def key_of(file: str, registry: str) -> Bound:
    """Return the bound that a value is a key of a dict, such as ACTIVATIONS in activations.py.

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
BELOW_2_31 = Bound(lambda x: x < 2**31, "must be < 2**31")  # torch counts in 32 bits

Count = Annotated[int, AT_LEAST_ONE, BELOW_2_31]


def read_section(
    kind: type[Config],
    params: Mapping[str, Mapping[str, Any]],
    name: str,
    where: str = "params.yaml",
    **derived: Any,
) -> Config:
    """Return section `name` as the dataclass `kind`; `derived` values are not set by the user.

    Raises InputError that names the key: for an unknown or missing key, a wrong type, a value out
    of bounds, and for what the dataclass refuses in __post_init__.
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
            suggestion = suggest(f"{section}.{key}", [f"{section}.{name}" for name in hints])
            raise InputError(f"unknown key {brief(f'{section}.{key}')}{suggestion}")
    for key in hints:
        if key not in values:
            raise InputError(f"missing key {section}.{key}")
    return kind(**{key: _convert(values[key], hints[key], f"{section}.{key}") for key in hints})


def _convert(value: Any, hint: Any, key: str) -> Any:
    """Return `value` as the type `hint`. Raise InputError that names key, value and problem."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        value = _convert(value, arguments[0], key)
        for bound in arguments[1:]:
            if isinstance(bound, Bound) and not bound.holds(value):
                raise InputError(f"{key} = {brief(value)}: {bound.text}")
        return value
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        inner, other = arguments  # None, or a word
        words = get_args(other)
        if value in (words or (None,)):
            return value
        try:
            return _convert(value, inner, key)
        except InputError as error:
            raise InputError(" or ".join([str(error), *words])) from None
    if origin is Literal:
        if not any(type(value) is type(word) and value == word for word in arguments):
            choice = ", ".join(str(a).lower() if type(a) is bool else a for a in arguments)
            raise InputError(f"{key} = {brief(value)}: must be one of {choice}")
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
    return f"{brief(repr(value))} is {kinds.get(type(value), 'a ' + type(value).__name__)}"


def brief(value: Any) -> str:
    """Return a value as text, cut after 80 characters."""
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def suggest(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean WORD?)" for the known word that is most similar, or "" if none is."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]}?)" if match else ""
