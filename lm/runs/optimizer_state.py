"""Check the optimizer state of a file against an optimizer, before anything is changed."""

import math
import sys
from collections import defaultdict
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from lm.base.errors import InputError
from lm.model.stored import Stored, word_of
from lm.model.transformer import TransformerLM

# entries of torch's optimizers that have the shape of their parameter
LIKE_PARAMETER = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}
KNOWN = LIKE_PARAMETER | {"step"}
State = dict[int, dict[str, Any]]


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the parameters in the order of their numbers in the optimizer's state."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def place(key: str) -> tuple[int, str]:
    """Split "optimizer.3.exp_avg" into the parameter's number and the entry of its state."""
    _, index, entry = key.split(".", 2)
    return int(index), entry


def fitting_groups(
    name: str, saved: list[dict[str, Any]], optimizer: torch.optim.Optimizer
) -> list[dict[str, Any]]:
    """Return the parameter groups of a file, each value as the type it has in this optimizer.

    JSON has neither tuples nor the floats of NumPy. Raises InputError if the groups are of another
    optimizer, or a value is not of the kind that it has in this one.
    """
    own = optimizer.state_dict()["param_groups"]
    if len(saved) != len(own):
        raise InputError(
            f"{name}: another optimizer: {len(saved)} parameter groups, expected {len(own)}"
        )
    groups = []
    for number, (theirs, ours) in enumerate(zip(saved, own, strict=True)):
        where = f"{name}: another optimizer: group {number}"
        if missing := sorted(ours.keys() - theirs.keys()):
            raise InputError(f"{where} has no {', '.join(missing)}")
        if theirs["params"] != ours["params"]:
            raise InputError(f"{where} has other parameters")
        fitting = {key: _like(theirs[key], ours[key], f"{where}: {key}") for key in ours}
        groups.append(theirs | fitting)
    return groups


def _like(saved: Any, own: Any, where: str) -> Any:
    """Return a value from JSON as the type of this optimizer's own value."""
    if own is None or (isinstance(own, bool) and (saved is None or isinstance(saved, bool))):
        return saved
    if isinstance(own, tuple | list) and isinstance(saved, list) and len(saved) == len(own):
        return type(own)(_like(a, b, where) for a, b in zip(saved, own, strict=True))
    is_number = isinstance(own, Real | Tensor) and not isinstance(own, bool)
    if is_number and type(saved) in (int, float):
        if abs(saved) <= sys.float_info.max or saved == own:
            if isinstance(own, Tensor):
                return torch.full_like(own, saved)
            return saved if isinstance(own, int) else type(own)(saved)  # 1 may have become 0.5
    elif isinstance(own, str | dict) and isinstance(saved, type(own)):
        return saved
    raise InputError(f"{where} = {str(saved)[:40]!r}, expected {type(own).__name__}")


def require_state(
    name: str,
    stored: Mapping[str, Stored],
    values: Mapping[str, Mapping[str, Any]],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Raise InputError unless the state in a file fits this optimizer's parameters.

    `values` are entries that are not tensors. Our optimizers name the entries of a parameter. In
    another optimizer all parameters of a group have the same known entries, or none before their
    first gradient.
    """
    parameters, found = parameters_of(optimizer), defaultdict[int, set[str]](set)
    names_of = getattr(optimizer, "state_names", None)  # of ours
    other = f"{name}: another optimizer"
    for key in stored:
        index, entry = _known_place(other, key, len(parameters))
        found[index].add(entry)
    for number, entries in values.items():
        for entry, value in entries.items():
            key = f"optimizer.{number}.{entry}"
            index, known = _known_place(other, key, len(parameters))
            if known != entry:
                raise InputError(f"{name}: {number} is not the number of a parameter")
            found[index].add(entry)
            if isinstance(value, str) or (isinstance(value, float) and not math.isfinite(value)):
                raise InputError(f"{name}: {key} = {str(value)[:40]!r}, expected a number")
    if names_of and values:
        raise InputError(f"{other}: expected only tensors in its state")
    first = 0
    for group in optimizer.param_groups:
        indices = range(first, first + len(group["params"]))
        first += len(indices)
        full = {i: found[i] if names_of else found[i] & KNOWN for i in indices if i in found}
        wanted = names_of(group) if names_of else set().union(*full.values())
        for index, names in full.items():
            for odd in sorted(names ^ wanted):
                what = "missing" if odd in wanted else "one too many"
                raise InputError(f"{other}: optimizer.{index}.{odd}: {what}")
    for key, tensor in stored.items():
        index, entry = place(key)
        expected = Stored(tuple(parameters[index].shape), parameters[index].dtype)
        if names_of and entry == "step":
            expected = Stored((), tensor.dtype)
        elif not names_of and entry not in LIKE_PARAMETER:
            continue
        elif not names_of and tensor.dtype.is_floating_point:  # torch converts it
            expected = expected._replace(dtype=tensor.dtype)
        if tensor != expected:
            there, here = (f"{each.shape} {word_of(each.dtype)}" for each in (tensor, expected))
            raise InputError(f"{other}: {key} is {there}, expected {here}")
    if found and names_of and isinstance(model, TransformerLM):  # it uses all of its weights
        for index, parameter in enumerate(parameters):
            if parameter.requires_grad and index not in found:
                raise InputError(f"{other}: no state of parameter {index}")


def _known_place(other: str, key: str, count: int) -> tuple[int, str]:
    """Split a key. Raises InputError, which begins with `other`, if it names no parameter."""
    try:
        index, entry = place(key)
    except ValueError:
        index, entry = -1, ""
    if not 0 <= index < count or key != f"optimizer.{index}.{entry}":
        raise InputError(f"{other}: {key}: this one has {count} parameters")
    return index, entry
