"""Training state and models as files that are whole, verified and safe to open.

A checkpoint is one safetensors file: model and optimizer tensors, and everything else as JSON in
its metadata; opening it runs no code. Beside it stands a manifest with its size and SHA-256:

    last.safetensors   written first
    last.json          its rename is the commit: without it there is no checkpoint

One that several processes write is a folder: the tensors by lm.dcp, the rest in header.json.
"""

import hashlib
import io
import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lm import dcp
from lm.config import read_section
from lm.errors import InputError
from lm.files import (
    atomic_write,
    read_json,
    sha256_file,
    sync_directory,
    write_json,
    writing,
)
from lm.model import ModelConfig, TransformerLM
from lm.processes import ALONE, Processes
from lm.shares import cut_like, whole
from lm.tokenizer import Tokenizer, load_tokenizer

FORMAT = 1
HEADER = "header.json"
PROVENANCE = ("model", "train", "inputs", "code", "environment")
BinaryFile = io.BufferedIOBase | io.RawIOBase
Extra = dict[str, Any]


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
    return tensors, {"checkpoint": json.dumps(header, sort_keys=True, default=float)}


def load_checkpoint(
    src: str | os.PathLike[str] | BinaryFile,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
) -> int:
    """Restore model and optimizer from a path or a binary file; returns the iteration.

    Raises InputError for a file that is torn, no checkpoint, of a newer format or of another
    model; then neither model nor optimizer has changed. A flipped bit among the weights is seen
    by `verify` alone.
    """
    if isinstance(src, str | os.PathLike) and Path(src).is_dir():
        tensors, header = _read_folder(Path(src), model, optimizer)
    else:
        tensors, header = _read(src)
    _restore(_name(src), tensors, header, model, optimizer)
    return int(header["iteration"])


def read_extra(path: Path) -> Extra:
    """What was saved beside model and optimizer, with the "iteration". Reads the header only."""
    if path.is_dir():
        header = _folder_header(path)
    else:
        with open_safetensors(path) as file:
            header = _header(str(path), file.metadata())
    return {**header["extra"], "iteration": header["iteration"]}


def _name(src: str | os.PathLike[str] | BinaryFile) -> str:
    return str(src if isinstance(src, str | os.PathLike) else getattr(src, "name", "checkpoint"))


def _restore(
    name: str,
    tensors: dict[str, Tensor],
    header: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
) -> None:
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    own = model.state_dict()
    _require_same_shapes(name, own, {key: tuple(weights[key].shape) for key in weights})
    if optimizer is not None:
        saved, parameters = header["optimizer"], _parameters(optimizer)
        state: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in saved["values"].items()}
        for key, tensor in tensors.items():
            if key.startswith("optimizer."):
                index, entry = _place(key)
                if index < len(parameters) and tensor.shape == parameters[index].shape:
                    tensor = cut_like(tensor, parameters[index])
                state.setdefault(index, {})[entry] = tensor
        try:
            optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
        except ValueError as error:
            raise InputError(f"{name}: another optimizer: {error}") from None
    model.load_state_dict({key: cut_like(weights[key], own[key]) for key in own})


def _require_same_shapes(
    name: str, own: dict[str, Tensor], found: dict[str, tuple[int, ...]]
) -> None:
    for key in sorted(own.keys() | found.keys()):
        here = tuple(own[key].shape) if key in own else "nothing"
        there = found.get(key, "nothing")
        if here != there:
            raise InputError(f"{name}: another model: {key} is {there}, expected {here}")


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters by the numbers that the optimizer's state gives them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _place(key: str) -> tuple[int, str]:
    """Of "optimizer.3.exp_avg": the number of the parameter and the entry of its state."""
    _, index, entry = key.split(".", 2)
    return int(index), entry


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
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What this process keeps of the tensors there, each cut as its parameter is."""
    header, stored = _folder_header(folder), dcp.shapes(folder)
    own = model.state_dict()
    found = {k.removeprefix("model."): v for k, v in stored.items() if k.startswith("model.")}
    _require_same_shapes(str(folder), own, found)
    tensors = {f"model.{key}": torch.empty_like(tensor) for key, tensor in own.items()}
    parameters = [] if optimizer is None else _parameters(optimizer)
    for key, shape in stored.items():
        if key.startswith("optimizer.") and (index := _place(key)[0]) < len(parameters):
            like = parameters[index]
            same = shape == tuple(like.shape)
            tensors[key] = torch.empty_like(like) if same else torch.empty(shape)
    dcp.read_tensors(tensors, folder)
    return tensors, header


def _read(src: str | os.PathLike[str] | BinaryFile) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if isinstance(src, str | os.PathLike):
        with open_safetensors(Path(src)) as file:
            header = _header(str(src), file.metadata())
            return {key: file.get_tensor(key) for key in file.keys()}, header  # noqa: SIM118
    data, name = src.read(), _name(src)
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__")
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{name}: not a safetensors file ({error})") from None
    return tensors, _header(name, metadata)


def open_safetensors(path: Path) -> Any:
    """A safetensors file, to be used by `with`. Raises InputError if it is none."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from None


def _header(name: str, metadata: dict[str, str] | None) -> dict[str, Any]:
    if not metadata or "checkpoint" not in metadata:
        raise InputError(f"{name}: holds tensors but no checkpoint of this project")
    try:
        header: dict[str, Any] = json.loads(metadata["checkpoint"])
    except ValueError as error:
        raise InputError(f"{name}: damaged header ({error})") from None
    if missing := {"format", "iteration", "optimizer", "extra"} - header.keys():
        raise InputError(f"{name}: damaged header: no {', '.join(sorted(missing))}")
    if header["format"] > FORMAT:
        raise InputError(
            f"{name}: written by a newer version (format {header['format']}, "
            f"this one reads <= {FORMAT})"
        )
    return header


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous, each with memory of its own, as safetensors wants them."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        if tensor.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        result[name] = tensor
    return result


def write_checkpoint(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write tensors that share no memory to `path`, atomically.

    Raises EnvironmentFault if they do not fit, or cannot be written for another reason.
    """
    scratch = path.with_name(path.name + ".tmp")
    with writing(path, sum(tensor.nbytes for tensor in tensors.values())):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            scratch.touch()
            mode = scratch.stat().st_mode  # safetensors would make it readable by the owner alone
            safetensors.torch.save_file(tensors, scratch, metadata)
            with open(scratch, "rb") as file:
                os.fsync(file.fileno())
            scratch.chmod(mode)
            scratch.replace(path)
        except BaseException as error:
            scratch.unlink(missing_ok=True)
            if isinstance(error, SafetensorError):
                raise _os_error(error) from None
            raise
        sync_directory(path.parent)


def _os_error(error: SafetensorError) -> Exception:
    """The OSError that the library speaks of in words: "I/O error: ... (os error 28)"."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else error


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
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if not path.with_suffix(".json").is_file():
        raise InputError(f"{path}: no manifest {path.with_suffix('.json').name} beside it")
    manifest = read_json(path.with_suffix(".json"))
    if not (isinstance(manifest, dict) and manifest.keys() >= {"size_bytes", "sha256"}):
        raise InputError(f"{path.with_suffix('.json')}: not the manifest of a checkpoint")
    _verify_file(path, manifest)


def _verify_folder(folder: Path, processes: Processes) -> None:
    file = folder.with_suffix(".json")
    if not file.is_file():
        raise InputError(f"{folder}: no manifest {file.name} beside it")
    manifest = read_json(file)
    if not (isinstance(manifest, dict) and isinstance(manifest.get("files"), dict)):
        raise InputError(f"{file}: not the manifest of a checkpoint in a folder")
    names = sorted(manifest["files"])
    if found := sorted({path.name for path in folder.iterdir()} ^ set(names)):
        raise InputError(f"{folder / found[0]}: missing, or not in the manifest")
    for name in names[processes.rank :: processes.size]:
        _verify_file(folder / name, manifest["files"][name])


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


def save_model(model: TransformerLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights, configuration and tokenizer: all that using the model needs."""
    tokenizer.save(folder)
    write_json(folder / "config.json", asdict(model.config))
    weights = _unshared(model.state_dict())
    write_checkpoint(weights, {"format": "pt"}, folder / "model.safetensors")


def read_provenance(folder: Path) -> dict[str, Any]:
    """What a model was made of: settings, hashes of inputs and code, environment.

    Raises InputError if the file is missing or something else.
    """
    provenance = read_json(folder / "provenance.json")
    if not (
        isinstance(provenance, dict)
        and all(isinstance(provenance.get(part), dict) for part in PROVENANCE)
    ):
        raise InputError(f"{folder / 'provenance.json'}: not a record of stage train; run it again")
    return provenance


def load_model(folder: Path, device: torch.device) -> tuple[TransformerLM, Tokenizer]:
    """A saved model, in evaluation mode, and its tokenizer.

    Raises InputError if a file is missing, torn or does not fit the others.
    """
    file = folder / "config.json"
    settings = read_json(file)
    if isinstance(settings, dict):  # models from before there was the choice
        settings.setdefault("intra_document_masking", False)
    config = read_section(ModelConfig, {"model": settings}, "model", str(file))
    model = TransformerLM(config)
    path = folder / "model.safetensors"
    with open_safetensors(path) as file:
        weights = {f"model.{key}": file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    _restore(str(path), weights, {}, model, None)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size != config.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
            f"{config.vocab_size}; they do not belong together"
        )
    return model.to(device).eval(), tokenizer
