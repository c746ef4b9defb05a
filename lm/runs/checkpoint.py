"""The whole state of a training as one file that is verified and safe to open.

A checkpoint is one safetensors file: model and optimizer tensors, and everything else as JSON in
its metadata; opening it runs no code. If several processes write it, it is a folder instead: see
sharded_checkpoint.py. Its manifest stands beside it: see manifest.py.

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
from typing import Annotated, Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lm.base.errors import InputError
from lm.base.sections import NOT_NEGATIVE, Count, read_section
from lm.machine.processes import ALONE, Processes
from lm.machine.sharded_tensors import cut_like, whole
from lm.model.safetensors_file import (
    open_safetensors,
    require_short_header,
    unshared,
    write_safetensors,
)
from lm.model.stored import Stored, as_stored, finite_keys, require_finite, require_weights
from lm.runs import sharded_checkpoint as sharded
from lm.runs.optimizer_state import State, fitting_groups, parameters_of, place, require_state

FORMAT = 1
BinaryFile = io.BufferedIOBase | io.RawIOBase
PathOrFile = str | os.PathLike[str] | BinaryFile
Extra = dict[str, Any]
Value = TypeVar("Value")


@dataclass(frozen=True)
class _OptimizerPart:
    param_groups: list[Extra]
    values: dict[str, Extra]  # by parameter and name: values that are not tensors


@dataclass(frozen=True)
class _Header:
    """Everything in a checkpoint but its tensors."""

    format: Count
    iteration: Annotated[int, NOT_NEGATIVE]
    optimizer: _OptimizerPart
    extra: Extra


def save_checkpoint(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    out: PathOrFile,
    extra: Extra | None = None,
) -> None:
    """Write model, optimizer, iteration and JSON-able extras to a path or a binary file.

    A path is replaced atomically. The bytes depend on nothing but what is saved.
    """
    tensors, metadata = contents(model, optimizer, iteration, extra)
    if isinstance(out, str | os.PathLike):
        write_safetensors(unshared(tensors), metadata, Path(out))
    else:
        out.write(safetensors.torch.save(unshared(tensors), metadata))


def contents(
    model: nn.Module, optimizer: torch.optim.Optimizer, iteration: int, extra: Extra | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the content of a checkpoint: the live tensors by name, and all else as metadata."""
    state = optimizer.state_dict()
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    values: dict[str, Extra] = {}
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
    # numbers of NumPy and torch become Python's; one metadata key, because safetensors writes
    # several in random order
    text = json.dumps(header, sort_keys=True, default=lambda number: number.item())
    return tensors, {"checkpoint": text}


def load_checkpoint(
    src: PathOrFile,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    processes: Processes = ALONE,
) -> int:
    """Restore model and optimizer from a path or a binary file; return the iteration.

    Raises InputError, in all of several processes, if the file is torn, no checkpoint, of a newer
    format, of another model or optimizer, or holds numbers that are not finite; then neither
    model nor optimizer has changed. Only `verify` detects a flipped bit in the weights.
    """
    iteration, weights, state = processes.together(lambda: _read_fitting(src, model, optimizer))
    if optimizer is not None:
        optimizer.load_state_dict(state)
    own = model.state_dict()
    model.load_state_dict({key: cut_like(weights[key], own[key]) for key in own})
    return iteration


def read_extra(path: Path) -> Extra:
    """Return a checkpoint's extras and its "iteration" without reading a tensor."""
    if path.is_dir():
        header = _read_folder_header(path)
    else:
        with open_safetensors(path) as file:
            header = _parse_header(str(path), file.metadata())
    return {**header.extra, "iteration": header.iteration}


def _read_fitting(
    src: PathOrFile, model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[int, dict[str, Tensor], Extra]:
    """Read iteration, weights and optimizer state. Raises InputError unless all of them fit.

    Change neither model nor optimizer. Without an optimizer, ignore that of the checkpoint.
    """
    if isinstance(src, str | os.PathLike) and Path(src).is_dir():
        name, folder = str(src), Path(src)
        header, stored = _read_folder_header(folder), sharded.stored(folder)
        groups = _require_fitting(name, stored, header.optimizer, model, optimizer)
        tensors = _read_folder(folder, stored, model, optimizer)
    else:
        name, header, tensors = _read_file(src)
        groups = _require_fitting(name, as_stored(tensors), header.optimizer, model, optimizer)
    if optimizer is None:
        tensors = {key: tensor for key, tensor in tensors.items() if key.startswith("model.")}
    require_finite(name, tensors, finite_keys(model, tensors))
    weights, of_optimizer = _split(tensors)
    state: State = {}
    if optimizer is not None:
        parameters = parameters_of(optimizer)
        state = {int(i): dict(v) for i, v in header.optimizer.values.items()}
        for key, tensor in of_optimizer.items():
            index, entry = place(key)
            if tensor.shape == parameters[index].shape:
                tensor = cut_like(tensor, parameters[index])
            state.setdefault(index, {})[entry] = tensor
    return header.iteration, weights, {"state": state, "param_groups": groups}


def _require_fitting(
    name: str,
    stored: Mapping[str, Stored],
    saved: _OptimizerPart,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
) -> list[Extra]:
    """Return the parameter groups. Raises InputError for another model or optimizer."""
    weights, of_optimizer = _split(stored)
    if odd := [key for key in stored if not key.startswith(("model.", "optimizer."))]:
        raise InputError(f"{name}: {odd[0]} belongs neither to a model nor to an optimizer")
    require_weights(name, model.state_dict(), weights)
    if optimizer is None:
        return []
    groups = fitting_groups(name, saved.param_groups, optimizer)
    require_state(name, of_optimizer, saved.values, model, optimizer)
    return groups


def _split(tensors: Mapping[str, Value]) -> tuple[dict[str, Value], dict[str, Value]]:
    """Split into the model's tensors, by their names there, and the optimizer's, by whole names."""
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    return weights, {k: v for k, v in tensors.items() if k.startswith("optimizer.")}


def _read_folder_header(folder: Path) -> _Header:
    file = folder / sharded.HEADER
    if not file.is_file():
        raise InputError(f"{folder}: holds no {sharded.HEADER}: not a checkpoint of this project")
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
    """Read this process's rows of each tensor; the optimizer's are cut as their parameters are."""
    tensors = {f"model.{key}": sharded.blank(t) for key, t in model.state_dict().items()}
    if optimizer is not None:
        parameters = parameters_of(optimizer)
        for key, (shape, dtype) in _split(stored)[1].items():
            like = parameters[place(key)[0]]
            same = shape == tuple(like.shape)
            tensors[key] = sharded.blank(like if same else torch.empty(shape, dtype=dtype))
    sharded.read_tensors(tensors, folder)
    return tensors


def _read_file(src: PathOrFile) -> tuple[str, _Header, dict[str, Tensor]]:
    """Return the name, the header and the tensors of a path or a binary file."""
    if isinstance(src, str | os.PathLike):
        with open_safetensors(Path(src)) as file:
            header = _parse_header(str(src), file.metadata())
            return str(src), header, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    name, data = str(getattr(src, "name", "checkpoint")), src.read()
    require_short_header(name, data)
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__")
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{name}: not a safetensors file ({error})") from None
    return name, _parse_header(name, metadata), tensors


def _parse_header(name: str, metadata: dict[str, str] | None) -> _Header:
    """Return the header in a file's metadata. Raises InputError if no version of ours wrote it."""
    if not metadata or "checkpoint" not in metadata:
        raise InputError(f"{name}: holds tensors but no checkpoint of this project")
    try:
        header = json.loads(metadata["checkpoint"])
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: damaged header ({error})") from None
    if not isinstance(header, dict):
        raise InputError(f"{name}: damaged header: holds no keys")
    known = {field.name for field in fields(_Header)}
    if missing := known - header.keys():
        raise InputError(f"{name}: damaged header: no {', '.join(sorted(missing))}")
    if type(header["format"]) is int and header["format"] > FORMAT:
        raise InputError(
            f"{name}: written by a newer version (format {header['format']}, "
            f"this one reads <= {FORMAT})"
        )
    header = {key: value for key, value in header.items() if key in known}
    return read_section(_Header, {"header": header}, "header", name)


def stored_weights(path: Path) -> dict[str, Stored]:
    """Return the shape and type of each weight in a checkpoint."""
    with open_safetensors(path) as file:
        return _split(as_stored({k: file.get_tensor(k) for k in file.keys()}))[0]  # noqa: SIM118


def weights_sha256(model: nn.Module) -> str:
    """Return the SHA-256 of all weights, bit for bit, and of their names."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        data: Any = whole(tensor).cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(data)
    return digest.hexdigest()
