"""Training state and models as files that are whole, verified and safe to open.

A checkpoint is one safetensors file: model and optimizer tensors, and everything else as JSON in
its metadata; opening it runs no code. Beside it stands a manifest with its size and SHA-256:

    last.safetensors   written first
    last.json          its rename is the commit: without it there is no checkpoint

One that several processes write is a folder: the tensors by sharded_checkpoint.py, the rest in
header.json.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lm.base.config import NOT_EMPTY, NOT_NEGATIVE, POSITIVE, Bound, Count, read_section
from lm.base.errors import InputError
from lm.base.files import (
    atomic_write,
    read_json,
    require_file,
    sha256_file,
    sync_directory,
    write_json,
    writing,
)
from lm.machine.processes import ALONE, Processes
from lm.machine.sharded_tensors import cut_like, whole
from lm.model.fitting import Stored, as_stored, finite_keys, require_finite, require_weights
from lm.model.model_folder import (
    _require_short_header,
    _unshared,
    open_safetensors,
    write_checkpoint,
)
from lm.runs import sharded_checkpoint as dcp
from lm.runs.optimizer_state import State, fitting_groups, parameters_of, place, require_state

FORMAT = 1
HEADER = "header.json"
BinaryFile = io.BufferedIOBase | io.RawIOBase
Extra = dict[str, Any]
Value = TypeVar("Value")
Number = Annotated[int, NOT_NEGATIVE]
BY_STEP = Bound(lambda x: all(map(str.isdecimal, x)), "must have steps as its keys")
TWO = Bound(lambda x: len(x) == 2, "must be two numbers")


@dataclass(frozen=True)
class _OptimizerPart:
    param_groups: list[Extra]
    values: dict[str, Extra]  # by parameter and name: what is no tensor


@dataclass(frozen=True)
class _Header:
    """What a checkpoint says beside its tensors."""

    format: Count
    iteration: Number
    optimizer: _OptimizerPart
    extra: Extra


def save_checkpoint(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    out: str | os.PathLike[str] | BinaryFile,
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
    """What a checkpoint holds: the live tensors by name, and everything else as metadata."""
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
    """A number of NumPy's or torch's as one of Python's."""
    number: int | float = value.item()
    return number


def load_checkpoint(
    src: str | os.PathLike[str] | BinaryFile,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    processes: Processes = ALONE,
) -> int:
    """Restore model and optimizer from a path or a binary file; returns the iteration.

    Raises InputError for a file that is torn, no checkpoint, of a newer format, of another model
    or optimizer, or with numbers that are not finite, in all of several processes; then neither
    model nor optimizer has changed. A flipped bit among the weights is seen by `verify` alone.
    """
    checked = processes.together(lambda: _checked(src, model, optimizer))
    if optimizer is not None:
        optimizer.load_state_dict(checked.optimizer)
    own = model.state_dict()
    model.load_state_dict({key: cut_like(checked.weights[key], own[key]) for key in own})
    return checked.iteration


def read_extra(path: Path) -> Extra:
    """What was saved beside model and optimizer, with the "iteration". Reads the header only."""
    if path.is_dir():
        header = _folder_header(path)
    else:
        with open_safetensors(path) as file:
            header = _header(str(path), file.metadata())
    return {**header["extra"], "iteration": header["iteration"]}


@dataclass(frozen=True)
class _Row:
    """Of the history: see lm.runs.history."""

    step: Count
    tokens: Number
    train_loss: float | None
    valid_loss: float | None
    learning_rate: float
    grad_norm: float | None


@dataclass(frozen=True)
class _History:
    interval: Count
    rows: list[_Row]
    pending: list[_Row]
    _sum: float
    _weight: float


@dataclass(frozen=True)
class _Best:
    valid_loss: float | None
    step: Count | None
    misses: Number


@dataclass(frozen=True)
class _Scaler:
    scale: Annotated[float, POSITIVE]
    growth_factor: float
    backoff_factor: float
    growth_interval: int
    _growth_tracker: int


@dataclass(frozen=True)
class _Identity:
    model: Extra
    train: Extra
    inputs: Extra
    code: Extra
    environment: Extra
    micro_batch_sizes: Annotated[dict[str, Count], NOT_EMPTY, BY_STEP]
    num_processes: Annotated[dict[str, Count], BY_STEP] | None
    resume_from: str | None


@dataclass(frozen=True)
class _OfRun:
    """What stage train saves beside model and optimizer: see lm.runs.run."""

    identity: _Identity
    scaler: _Scaler | None
    history: _History
    best: _Best
    valid_loss: float | None
    weights: Annotated[dict[str, str], BY_STEP]
    skipped: Annotated[list[Number], TWO]


def read_run(path: Path) -> Extra:
    """The same of a checkpoint of stage train. Raises InputError for what no training saves."""
    extra = read_extra(path)
    iteration = extra["iteration"]
    if not isinstance(extra.get("identity"), dict):
        raise InputError(
            f"{path}: not saved by stage train; use lm.runs.checkpoint.load_checkpoint"
        )
    identity = {"num_processes": None, "resume_from": None} | extra["identity"]
    known = {key.name: extra[key.name] for key in fields(_OfRun) if key.name in extra}
    known |= {"identity": identity, "scaler": known.get("scaler") or None}
    run = read_section(_OfRun, {"extra": known}, "extra", str(path))
    history, best = run.history, run.best
    merged = len(history.rows) * history.interval
    steps = [
        *range(history.interval, merged + 1, history.interval),
        *range(merged + 1, iteration + 1),
    ]
    if merged > iteration or [row.step for row in (*history.rows, *history.pending)] != steps:
        raise InputError(f"{path}: its history is not of {iteration} steps")
    if (best.step is None) != (best.valid_loss is None) or (
        best.step is not None and not (best.step <= iteration and str(best.step) in run.weights)
    ):
        raise InputError(f"{path}: extra.best = {extra['best']}: of no step of its {iteration}")
    skipped, in_a_row = run.skipped
    if not in_a_row <= skipped <= iteration:
        raise InputError(f"{path}: extra.skipped = {run.skipped}: more than its {iteration} steps")
    return extra


def _name(src: str | os.PathLike[str] | BinaryFile) -> str:
    return str(src if isinstance(src, str | os.PathLike) else getattr(src, "name", "checkpoint"))


class _Checked(NamedTuple):
    """What a checkpoint holds, all of which fits model and optimizer."""

    iteration: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]  # for load_state_dict


def _checked(
    src: str | os.PathLike[str] | BinaryFile,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
) -> _Checked:
    name = _name(src)
    if isinstance(src, str | os.PathLike) and Path(src).is_dir():
        header, stored = _folder_header(Path(src)), dcp.stored(Path(src))
        groups = _require_fitting(name, stored, header, model, optimizer)
        tensors = _read_folder(Path(src), stored, model, optimizer)
    else:
        tensors, header = _read(src)
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
    return _Checked(header["iteration"], weights, {"state": state, "param_groups": groups})


def _require_fitting(
    name: str,
    stored: Mapping[str, Stored],
    header: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
) -> list[dict[str, Any]]:
    """The parameter groups. Raises InputError unless a checkpoint is of this model and optimizer.

    Without an optimizer that of the checkpoint is not looked at.
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


def stored_weights(path: Path) -> dict[str, Stored]:
    """What a checkpoint's file says of the weights of its model, without reading them."""
    with open_safetensors(path) as file:
        return _part(as_stored({k: file.get_tensor(k) for k in file.keys()}), "model.")  # noqa: SIM118


def _part(tensors: Mapping[str, Value], prefix: str, whole: bool = False) -> dict[str, Value]:
    """Those whose names begin so, under the rest of their names, or under the whole."""
    skipped = "" if whole else prefix
    return {k.removeprefix(skipped): v for k, v in tensors.items() if k.startswith(prefix)}


def _folder_header(folder: Path) -> dict[str, Any]:
    file = folder / HEADER
    if not file.is_file():
        raise InputError(f"{folder}: no {HEADER} in it: no checkpoint of this project")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: damaged header ({error})") from None
    return _header(str(file), {"checkpoint": text})


def _read_folder(
    folder: Path,
    stored: Mapping[str, Stored],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
) -> dict[str, Tensor]:
    """What this process keeps of the tensors there, each cut as its parameter is."""
    tensors = {f"model.{key}": dcp.blank(t) for key, t in model.state_dict().items()}
    parameters = [] if optimizer is None else parameters_of(optimizer)
    for key, (shape, dtype) in stored.items():
        if parameters and key.startswith("optimizer."):
            like = parameters[place(key)[0]]
            same = shape == tuple(like.shape)
            tensors[key] = dcp.blank(like if same else torch.empty(shape, dtype=dtype))
    dcp.read_tensors(tensors, folder)
    return tensors


def _read(src: str | os.PathLike[str] | BinaryFile) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if isinstance(src, str | os.PathLike):
        with open_safetensors(Path(src)) as file:
            header = _header(str(src), file.metadata())
            return {key: file.get_tensor(key) for key in file.keys()}, header  # noqa: SIM118
    data, name = src.read(), _name(src)
    _require_short_header(name, data)
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__")
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{name}: not a safetensors file ({error})") from None
    return tensors, _header(name, metadata)


def _header(name: str, metadata: dict[str, str] | None) -> dict[str, Any]:
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


def write_folder(
    tensors: dict[str, Tensor], metadata: dict[str, str], folder: Path, writers: Processes
) -> None:
    """Write and commit a checkpoint that several processes hold, all of them together.

    What the commit leaves is whole: neither a process that dies nor a full disk tears it. Raises
    EnvironmentFault, in all of them, if the disk of one is full.
    """
    scratch = folder.with_name(folder.name + ".tmp")

    def begin() -> None:
        with writing(scratch):
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            atomic_write(scratch / HEADER, metadata["checkpoint"].encode())

    def finish() -> None:
        with writing(folder):
            files[HEADER] = _described(scratch / HEADER)
            sync_directory(scratch)
            discard(folder)  # a damaged one, which was passed over
            scratch.replace(folder)
            sync_directory(folder.parent)
            write_json(folder.with_suffix(".json"), {"files": dict(sorted(files.items()))})

    try:
        writers.lead(begin)
        dcp.write_tensors(tensors, scratch, writers)
        own = dcp.own_files(scratch, writers.rank)
        hashed = writers.together(lambda: {file.name: _described(file, sync=True) for file in own})
        files = {name: entry for part in writers.gather(hashed) for name, entry in part.items()}
        writers.lead(finish)
    finally:
        if writers.leads:  # after a failure, what it left on a full disk
            shutil.rmtree(scratch, ignore_errors=True)


def discard(path: Path) -> None:
    """Delete a checkpoint, if there is one; first its manifest, without which it does not count."""
    path.with_suffix(".json").unlink(missing_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def as_one_file(folder: Path, path: Path) -> None:
    """Write a checkpoint that is a folder as the file that one process would have written."""
    metadata = {"checkpoint": (folder / HEADER).read_text(encoding="utf-8")}
    write_checkpoint(dcp.assemble(folder), metadata, path)


def commit(path: Path) -> None:
    """Write the manifest of a checkpoint that is on disk; from now on it counts."""
    write_json(path.with_suffix(".json"), _described(path))


def _described(file: Path, sync: bool = False) -> dict[str, Any]:
    if sync:
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
    return {"size_bytes": file.stat().st_size, "sha256": sha256_file(file)}


def verify(path: Path, processes: Processes = ALONE) -> None:
    """Raises InputError unless a checkpoint is what its manifest describes, a file or a folder.

    Of a folder's files each of several processes hashes some: all are sound if none raises.
    """
    if path.is_dir():
        _verify_folder(path, processes)
        return
    require_file(path)
    manifest = _manifest(path)
    if not _is_description(manifest):
        raise InputError(f"{path.with_suffix('.json')}: not the manifest of a checkpoint")
    _verify_file(path, manifest)


def _manifest(path: Path) -> Any:
    file = path.with_suffix(".json")
    if not file.exists():
        raise InputError(f"{path}: no manifest {file.name} beside it")
    return read_json(file)


def _is_description(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and type(value.get("size_bytes")) is int
        and isinstance(value.get("sha256"), str)
    )


def _verify_folder(folder: Path, processes: Processes) -> None:
    manifest = _manifest(folder)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not (isinstance(files, dict) and all(map(_is_description, files.values()))):
        file = folder.with_suffix(".json")
        raise InputError(f"{file}: not the manifest of a checkpoint in a folder")
    names = sorted(files)
    if found := sorted({path.name for path in folder.iterdir()} ^ set(names)):
        raise InputError(f"{folder / found[0]}: missing, or not in the manifest")
    for name in names[processes.rank :: processes.size]:
        _verify_file(folder / name, files[name])


def _verify_file(path: Path, manifest: dict[str, Any]) -> None:
    if path.stat().st_size != manifest["size_bytes"]:
        raise InputError(
            f"{path}: {path.stat().st_size} bytes, its manifest says {manifest['size_bytes']}"
        )
    if sha256_file(path) != manifest["sha256"]:
        raise InputError(f"{path}: content differs from the hash in its manifest")


def weights_sha256(model: nn.Module) -> str:
    """One hash of all weights, bit for bit, with their names."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        data: Any = whole(tensor).cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(data)
    return digest.hexdigest()
