"""The whole state of a training as one file that is verified and safe to open.

A checkpoint is one safetensors file: model and optimizer tensors, and everything else as JSON in
its metadata; opening it runs no code. One that several processes write is a folder, see
sharded_checkpoint.py. Beside either stands its manifest, see manifest.py.

    save_checkpoint   contents -> file
    load_checkpoint   file or folder -> header and tensors -> do all fit? -> model and optimizer
"""

import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lm.base.config import NOT_NEGATIVE, Count, read_section
from lm.base.errors import InputError
from lm.machine.processes import ALONE, Processes
from lm.machine.sharded_tensors import cut_like, whole
from lm.model.fitting import Stored, as_stored, finite_keys, require_finite, require_weights
from lm.model.model_folder import (
    _require_short_header,
    _unshared,
    open_safetensors,
    write_checkpoint,
)
from lm.runs import sharded_checkpoint as sharded
from lm.runs.optimizer_state import State, fitting_groups, parameters_of, place, require_state

FORMAT = 1
BinaryFile = io.BufferedIOBase | io.RawIOBase
Source = str | os.PathLike[str] | BinaryFile
Extra = dict[str, Any]
Value = TypeVar("Value")


@dataclass(frozen=True)
class _OptimizerPart:
    param_groups: list[Extra]
    values: dict[str, Extra]  # by parameter and name: what is no tensor


@dataclass(frozen=True)
class _Header:
    """What stands in a checkpoint beside its tensors."""

    format: Count
    iteration: Annotated[int, NOT_NEGATIVE]
    optimizer: _OptimizerPart
    extra: Extra


def save_checkpoint(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    out: Source,
    extra: Extra | None = None,
) -> None:
    """Write model, optimizer, iteration and JSON-able extras to a path or a binary file.

    A path is replaced atomically. The bytes depend on nothing but what is saved.
    """
    tensors, metadata = contents(model, optimizer, iteration, extra)
    tensors = _unshared(tensors)
    if isinstance(out, str | os.PathLike):
        write_checkpoint(tensors, metadata, Path(out))
    else:
        out.write(safetensors.torch.save(tensors, metadata))


def contents(
    model: nn.Module, optimizer: torch.optim.Optimizer, iteration: int, extra: Extra | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what a checkpoint holds: the live tensors by name, and all else as metadata."""
    state = optimizer.state_dict()
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    values: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                values.setdefault(str(index), {})[name] = value
    header = {
        "format": FORMAT,
        "iteration": iteration,
        "optimizer": {"param_groups": state["param_groups"], "values": values},
        "extra": extra or {},
    }
    # one metadata key only: safetensors writes several in random order
    return tensors, {"checkpoint": json.dumps(header, sort_keys=True, default=_number)}


def _number(value: Any) -> int | float:
    """Return a number of NumPy or torch as one of Python."""
    number: int | float = value.item()
    return number


def load_checkpoint(
    src: Source,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    processes: Processes = ALONE,
) -> int:
    """Restore model and optimizer from a path or a binary file; return the iteration.

    Raises InputError for a file that is torn, no checkpoint, of a newer format, of another model
    or optimizer, or with numbers that are not finite, in all of several processes; then neither
    model nor optimizer has changed. Only `verify` sees a flipped bit among the weights.
    """
    fitting = processes.together(lambda: _read_fitting(src, model, optimizer))
    if optimizer is not None:
        optimizer.load_state_dict(fitting.optimizer)
    own = model.state_dict()
    model.load_state_dict({key: cut_like(fitting.weights[key], own[key]) for key in own})
    return fitting.iteration


def read_extra(path: Path) -> Extra:
    """Return what was saved beside model and optimizer, with the "iteration"; read no tensor."""
    if path.is_dir():
        header = _read_folder_header(path)
    else:
        with open_safetensors(path) as file:
            header = _parse_header(str(path), file.metadata())
    return {**header["extra"], "iteration": header["iteration"]}


def _name(src: Source) -> str:
    return str(src if isinstance(src, str | os.PathLike) else getattr(src, "name", "checkpoint"))


class _Fitting(NamedTuple):
    """The content of a checkpoint, all of which fits model and optimizer."""

    iteration: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]  # for load_state_dict


def _read_fitting(
    src: Source, model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> _Fitting:
    """Read a checkpoint. Raises InputError unless all of it fits; nothing has changed yet."""
    name = _name(src)
    if isinstance(src, str | os.PathLike) and Path(src).is_dir():
        header, stored = _read_folder_header(Path(src)), sharded.stored(Path(src))
        groups = _require_fitting(name, stored, header, model, optimizer)
        tensors = _read_folder(Path(src), stored, model, optimizer)
    else:
        tensors, header = _read_file(src)
        groups = _require_fitting(name, as_stored(tensors), header, model, optimizer)
    weights = _part(tensors, "model.")
    if optimizer is None:
        tensors = {f"model.{key}": tensor for key, tensor in weights.items()}
    require_finite(name, tensors, finite_keys(model, tensors))
    state: State = {}
    if optimizer is not None:
        parameters = parameters_of(optimizer)
        state = {int(i): dict(v) for i, v in header["optimizer"]["values"].items()}
        for key, tensor in _part(tensors, "optimizer.", whole=True).items():
            index, entry = place(key)
            if tensor.shape == parameters[index].shape:
                tensor = cut_like(tensor, parameters[index])
            state.setdefault(index, {})[entry] = tensor
    return _Fitting(header["iteration"], weights, {"state": state, "param_groups": groups})


def _require_fitting(
    name: str,
    stored: Mapping[str, Stored],
    header: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
) -> list[dict[str, Any]]:
    """Return the parameter groups. Raises InputError for another model or optimizer.

    Without an optimizer, that of the checkpoint is ignored.
    """
    for key in stored:
        if not key.startswith(("model.", "optimizer.")):
            raise InputError(f"{name}: {key} is neither of a model nor of an optimizer")
    require_weights(name, model.state_dict(), _part(stored, "model."))
    if optimizer is None:
        return []
    saved = header["optimizer"]
    groups = fitting_groups(name, saved["param_groups"], optimizer)
    of_optimizer = _part(stored, "optimizer.", whole=True)
    require_state(name, of_optimizer, saved["values"], model, optimizer)
    return groups


def _part(tensors: Mapping[str, Value], prefix: str, whole: bool = False) -> dict[str, Value]:
    """Return those whose names have a prefix, without it, or under their whole names."""
    skipped = "" if whole else prefix
    return {k.removeprefix(skipped): v for k, v in tensors.items() if k.startswith(prefix)}


def _read_folder_header(folder: Path) -> dict[str, Any]:
    file = folder / sharded.HEADER
    if not file.is_file():
        raise InputError(f"{folder}: no {sharded.HEADER} in it: no checkpoint of this project")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: damaged header ({error})") from None
    return _parse_header(str(file), {"checkpoint": text})


def _read_folder(
    folder: Path,
    stored: Mapping[str, Stored],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
) -> dict[str, Tensor]:
    """Read the rows of each tensor that this process keeps, cut as its parameter is."""
    tensors = {f"model.{key}": sharded.blank(t) for key, t in model.state_dict().items()}
    parameters = [] if optimizer is None else parameters_of(optimizer)
    for key, (shape, dtype) in stored.items():
        if parameters and key.startswith("optimizer."):
            like = parameters[place(key)[0]]
            same = shape == tuple(like.shape)
            tensors[key] = sharded.blank(like if same else torch.empty(shape, dtype=dtype))
    sharded.read_tensors(tensors, folder)
    return tensors


def _read_file(src: Source) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the header of a path or a binary file."""
    if isinstance(src, str | os.PathLike):
        with open_safetensors(Path(src)) as file:
            header = _parse_header(str(src), file.metadata())
            return {key: file.get_tensor(key) for key in file.keys()}, header  # noqa: SIM118
    data, name = src.read(), _name(src)
    _require_short_header(name, data)
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__")
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{name}: not a safetensors file ({error})") from None
    return tensors, _parse_header(name, metadata)


def _parse_header(name: str, metadata: dict[str, str] | None) -> dict[str, Any]:
    """Return the header that metadata hold. Raises InputError for one that no version wrote."""
    if not metadata or "checkpoint" not in metadata:
        raise InputError(f"{name}: holds tensors but no checkpoint of this project")
    try:
        header = json.loads(metadata["checkpoint"])
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: damaged header ({error})") from None
    if not isinstance(header, dict):
        raise InputError(f"{name}: damaged header: holds no keys")
    if missing := {"format", "iteration", "optimizer", "extra"} - header.keys():
        raise InputError(f"{name}: damaged header: no {', '.join(sorted(missing))}")
    if type(header["format"]) is int and header["format"] > FORMAT:
        raise InputError(
            f"{name}: written by a newer version (format {header['format']}, "
            f"this one reads <= {FORMAT})"
        )
    known = {field.name: header[field.name] for field in fields(_Header)}
    read_section(_Header, {"header": known}, "header", name)
    return header


def stored_weights(path: Path) -> dict[str, Stored]:
    """Return shape and type of the weights that a checkpoint holds."""
    with open_safetensors(path) as file:
        return _part(as_stored({k: file.get_tensor(k) for k in file.keys()}), "model.")  # noqa: SIM118


def weights_sha256(model: nn.Module) -> str:
    """Return one hash of all weights, bit for bit, with their names."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        data: Any = whole(tensor).cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(data)
    return digest.hexdigest()
