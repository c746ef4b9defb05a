"""Tensors in a folder that several processes write and any number reads.

By torch.distributed.checkpoint, which plans who writes and who reads what, in its safetensors
format: opening a folder runs no code, where that library's own format is a pickle.

    shard-00001-model-00001-of-00001.safetensors   what rank 0 wrote, and so on
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from lm.base.errors import EnvironmentFault, InputError
from lm.base.files import writing
from lm.machine.processes import Processes, common, of_rank
from lm.model.fitting import Stored


def write_tensors(tensors: dict[str, Tensor], folder: Path, writers: Processes) -> None:
    """Write what each process keeps of some tensors, all processes together.

    Of a tensor that all have, one writes it. Raises EnvironmentFault, in every process, if the
    disk of one is full.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    storage = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _told_in_one_line(folder, by_all=True):
        save(tensors, storage_writer=storage, process_group=writers.messages)


def own_files(folder: Path, rank: int) -> list[Path]:
    """What a rank has written there."""
    return sorted(folder.glob(f"shard-{rank + 1:05d}-*.safetensors"))


def stored(folder: Path) -> dict[str, Stored]:
    """The shape of each tensor there, whole, and its type."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        with _told_in_one_line(folder):
            found: Any = HuggingFaceStorageReader(str(folder)).read_metadata()
    except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        if isinstance(error, InputError | EnvironmentFault):
            raise
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
    """A tensor of this kind to be read into: not a number where no file has anything."""
    return torch.full_like(like, math.nan if like.is_floating_point() else 0)


def read_tensors(targets: dict[str, Tensor], folder: Path) -> None:
    """Fill tensors in place, of shared ones the rows of this process; nobody waits for anybody."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with _told_in_one_line(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(targets, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def assemble(folder: Path) -> dict[str, Tensor]:
    """Every tensor there, whole, in this process's memory."""
    tensors = {
        name: blank(torch.empty(shape, dtype=dtype))
        for name, (shape, dtype) in stored(folder).items()
    }
    read_tensors(tensors, folder)
    return tensors


@contextmanager
def _told_in_one_line(folder: Path, by_all: bool = False) -> Iterator[None]:
    """Turn what the library raises, a BaseException with a traceback of each rank, into faults.

    What processes do together, by_all, is raised by all and names the rank whose fault it is.
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
