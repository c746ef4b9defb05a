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
from lm.model.fitting import Stored, word_of
from lm.model.transformer import TransformerLM

# what torch's optimizers and ours keep of each number of a parameter, by these names
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
    """Return the parameter groups of a file, each value of the type it has in this optimizer.

    JSON knows neither tuples nor the floats of NumPy. Raises InputError if they are of another
    optimizer, or have something else where this one has a number.
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
        groups.append(
            {
                key: _like(value, ours[key], f"{where}: {key}") if key in ours else value
                for key, value in theirs.items()
            }
        )
    return groups


def _like(saved: Any, own: Any, where: str) -> Any:
    """Return a value from JSON as the type that this optimizer has in its place."""
    fits, value = True, saved
    if isinstance(own, bool):
        fits = saved is None or isinstance(saved, bool)
    elif isinstance(own, tuple | list):
        fits = isinstance(saved, list) and len(saved) == len(own)
        if fits:
            value = type(own)(_like(a, b, where) for a, b in zip(saved, own, strict=True))
    elif isinstance(own, Real | Tensor):
        fits = type(saved) in (int, float) and (abs(saved) <= sys.float_info.max or saved == own)
        if fits:
            value = _number_like(saved, own)
    elif own is not None:
        fits = isinstance(saved, type(own))
    if not fits:
        raise InputError(f"{where} = {str(saved)[:40]!r}, expected {type(own).__name__}")
    return value


def _number_like(saved: float, own: Any) -> Any:
    if isinstance(own, Tensor):
        return torch.full_like(own, saved)
    if isinstance(own, int):
        return saved  # a rate of 1 may have become 0.5 since
    return type(own)(saved)


def require_state(
    name: str,
    stored: Mapping[str, Stored],
    values: Mapping[str, Mapping[str, Any]],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Raise InputError unless the state in a file can be that of this optimizer's parameters.

    `values` are what is no tensor. Our optimizers say which entries a parameter has. In another
    optimizer all parameters of a group have the same known entries, or none before a gradient came.
    """
    parameters, found = parameters_of(optimizer), defaultdict[int, set[str]](set)
    names_of = getattr(optimizer, "state_names", None)  # of ours
    for key, tensor in stored.items():
        index, entry = _known_place(name, key, len(parameters))
        found[index].add(entry)
        expected: tuple[int, ...] = tuple(parameters[index].shape)
        dtype = parameters[index].dtype
        if entry == "step" and names_of:
            expected, dtype = (), tensor.dtype
        elif entry not in LIKE_PARAMETER:
            continue
        elif not names_of and tensor.dtype.is_floating_point:  # which torch turns into its own
            dtype = tensor.dtype
        if tensor != (expected, dtype):
            there, here = (
                f"{shape} {word_of(kind)}" for shape, kind in (tensor, (expected, dtype))
            )
            raise InputError(f"{name}: another optimizer: {key} is {there}, expected {here}")
    for number, entries in values.items():
        for entry, value in entries.items():
            key = f"optimizer.{number}.{entry}"
            index, known = _known_place(name, key, len(parameters))
            if known != entry:
                raise InputError(f"{name}: {number} is not the number of a parameter")
            found[index].add(entry)
            if isinstance(value, str) or (isinstance(value, float) and not math.isfinite(value)):
                raise InputError(f"{name}: {key} = {str(value)[:40]!r}, expected a number")
    if names_of and values:
        raise InputError(f"{name}: another optimizer: all of its state are tensors")
    numbers = iter(range(len(parameters)))
    for group in optimizer.param_groups:
        indices = [next(numbers) for _ in group["params"]]
        full = {i: found[i] if names_of else found[i] & KNOWN for i in indices if i in found}
        wanted = names_of(group) if names_of else set().union(*full.values())
        for index, names in full.items():
            for odd in sorted(names ^ wanted):
                what = "missing" if odd in wanted else "one too many"
                raise InputError(f"{name}: another optimizer: optimizer.{index}.{odd}: {what}")
    if found and names_of and isinstance(model, TransformerLM):  # which uses all of its weights
        for index, parameter in enumerate(parameters):
            if parameter.requires_grad and index not in found:
                raise InputError(f"{name}: another optimizer: no state of parameter {index}")


def _known_place(name: str, key: str, count: int) -> tuple[int, str]:
    try:
        index, entry = place(key)
    except ValueError:
        index, entry = -1, ""
    if not 0 <= index < count or key != f"optimizer.{index}.{entry}":
        raise InputError(f"{name}: another optimizer: {key}: this one has {count} parameters")
    return index, entry
