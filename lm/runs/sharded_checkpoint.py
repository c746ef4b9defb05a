"""Checkpoints as folders, which several processes write and any number of processes reads.

torch.distributed.checkpoint plans which process writes and reads what. Its safetensors format is
used: opening a folder runs no code, while the library's own format is a pickle.

    shard-00001-model-00001-of-00001.safetensors   what rank 0 wrote, and so on
    header.json                                    all but the tensors: see checkpoint.py
"""

import math
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from lm.base.errors import EnvironmentFault, InputError
from lm.base.files import atomic_write, sync, write_json, writing
from lm.machine.processes import Processes, common, of_rank
from lm.model.safetensors_file import write_safetensors
from lm.model.stored import Stored
from lm.runs.manifest import discard, size_and_hash

HEADER = "header.json"


def write_folder(
    tensors: dict[str, Tensor], metadata: dict[str, str], folder: Path, writers: Processes
) -> None:
    """Write and commit a checkpoint that several processes hold; all of them must call this.

    Each process writes its rows of sharded tensors; one process writes a tensor that all have.
    Neither a process that dies nor a full disk leaves a torn checkpoint. Raises
    EnvironmentFault, in all of them, if the disk of one is full.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    scratch = folder.with_name(folder.name + ".tmp")

    def begin() -> None:
        with writing(scratch):
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            atomic_write(scratch / HEADER, metadata["checkpoint"].encode())

    def own_files() -> dict[str, Any]:
        own = list(scratch.glob(f"shard-{writers.rank + 1:05d}-*.safetensors"))
        for file in own:
            sync(file)
        return {file.name: size_and_hash(file) for file in own}

    def finish() -> None:
        with writing(folder):
            files[HEADER] = size_and_hash(scratch / HEADER)
            sync(scratch)
            discard(folder)  # a damaged one that was skipped
            scratch.replace(folder)
            sync(folder.parent)
            write_json(folder.with_suffix(".json"), {"files": dict(sorted(files.items()))})

    try:
        writers.lead(begin)
        storage = HuggingFaceStorageWriter(str(scratch), save_distributed=True)
        with _errors_in_one_line(scratch, by_all=True):
            save(tensors, storage_writer=storage, process_group=writers.messages)
        parts = writers.gather(writers.together(own_files))
        files = {name: entry for part in parts for name, entry in part.items()}
        writers.lead(finish)
    finally:
        if writers.leads:  # a failure may leave files on a full disk
            shutil.rmtree(scratch, ignore_errors=True)


def stored(folder: Path) -> dict[str, Stored]:
    """Return the whole shape and the type of each tensor in a folder."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    damages = (SafetensorError, LookupError, TypeError, AttributeError, RuntimeError, ValueError)
    try:
        found: Any = HuggingFaceStorageReader(str(folder)).read_metadata()
    except damages as error:
        raise InputError(f"{folder}: damaged shards: {_first_line(error)}") from None
    tensors = {
        name: Stored(tuple(entry.size), entry.properties.dtype)
        for name, entry in found.state_dict_metadata.items()
    }
    for index, part in found.storage_data.items():
        if part.dtype != tensors[index.fqn].dtype:
            raise InputError(f"{folder}: {index.fqn} is of several types")
    return tensors


def blank(like: Tensor) -> Tensor:
    """Return a tensor like this one to read into; rows that no file holds stay nan."""
    return torch.full_like(like, math.nan if like.is_floating_point() else 0)


def read_tensors(targets: dict[str, Tensor], folder: Path) -> None:
    """Fill tensors in place, sharded ones with this process's rows; wait for no other process."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with _errors_in_one_line(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(targets, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def as_one_file(folder: Path, path: Path) -> None:
    """Write a checkpoint that is a folder as the file that one process would have written."""
    tensors = {
        name: blank(torch.empty(shape, dtype=dtype))
        for name, (shape, dtype) in stored(folder).items()
    }
    read_tensors(tensors, folder)
    metadata = {"checkpoint": (folder / HEADER).read_text(encoding="utf-8")}
    write_safetensors(tensors, metadata, path)


@contextmanager
def _errors_in_one_line(folder: Path, by_all: bool = False) -> Iterator[None]:
    """Turn the library's errors, with a traceback of each rank, into faults of one line.

    With `by_all` all processes are here, and all raise the fault and name the rank that caused it.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except SafetensorError as error:
        raise InputError(f"{folder}: not safetensors files ({error})") from None
    except CheckpointException as error:
        rank, (reason, _) = min(error.failures.items())
        try:
            if not isinstance(reason, OSError):
                raise InputError(f"{folder}: {_first_line(reason)}") from None
            with writing(folder):
                raise reason
        except (InputError, EnvironmentFault) as fault:
            raise common(of_rank(rank, fault)) if by_all else fault from None


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
