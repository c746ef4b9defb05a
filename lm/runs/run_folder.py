"""The run folder: the checkpoints of a run, kept whatever happens to the process that writes them.

    step-00000500.safetensors   written by a thread, from a copy of the state in memory
    step-00000500.json          its manifest: the rename of this file is the commit
    lock                        held as long as a process trains this run

Several processes write a folder step-00000500 instead, a thread of each its share.

The folder lies outside of every DVC output, because DVC deletes those before it starts a stage.
"""

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from lm.base.errors import EnvironmentFault, InputError
from lm.base.files import writing
from lm.base.run_id import locked
from lm.machine.processes import ALONE, Processes
from lm.machine.sharded_tensors import local, staged
from lm.model.safetensors_file import write_safetensors
from lm.runs.checkpoint import Extra, contents, read_extra
from lm.runs.manifest import commit, discard, verify
from lm.runs.sharded_checkpoint import write_folder


class RunFolder:
    """The newest checkpoints of one run, and the best ones that they refer to.

    A checkpoint's extra["best"]["step"] names the step of the best one. Only one process may use a
    folder at a time, or several that train together.
    """

    def __init__(self, path: Path, keep: int, processes: Processes = ALONE):
        """Make and lock the folder.

        Raises Busy if another process uses it, EnvironmentFault if not all of these processes see
        the same folder.
        """
        self.path, self.keep = path, keep
        self.writes_folders = processes.store is not None
        self._writers = processes.with_own_group() if self.writes_folders else ALONE
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._writer = ThreadPoolExecutor(max_workers=1, initializer=partial(_begin_thread, gpu))
        self._pending: Future[None] | None = None
        self._buffers: dict[str, Tensor] = {}
        self._lock: Any = None
        processes.lead(self._open)
        if processes.size > 1:
            _require_shared(path, processes)

    def _open(self) -> None:
        _require_kind(self.path, folder=True)
        _require_kind(self.path / "lock", folder=False)
        for path in sorted(self.path.glob("step-*")):
            if path.suffix in ("", ".safetensors", ".json"):
                _require_kind(path, folder=path.suffix == "")
        self._lock = locked(self.path)
        for litter in (*self.path.glob("*.tmp"), *self.path.glob(".tmp*")):  # ours and safetensors'
            folder = litter.is_dir() and not litter.is_symlink()
            shutil.rmtree(litter) if folder else litter.unlink()
        for path in newest_first(self.path):  # a kill came before the commit: delete it
            if not path.with_suffix(".json").exists():
                discard(path)

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, extra: Extra
    ) -> None:
        """Copy the state; a thread writes it, then deletes checkpoints that are no longer needed.

        Training waits for the copy in memory, not for the disk, unless the previous save is still
        being written. Raises EnvironmentFault if the previous save failed.
        """
        self.wait()
        tensors, metadata = contents(model, optimizer, step, extra)
        copies = {}
        for name, tensor in tensors.items():
            rows = local(tensor)
            if name not in self._buffers:
                self._buffers[name] = torch.empty(
                    rows.shape, dtype=rows.dtype, pin_memory=rows.is_cuda
                )
            self._buffers[name].copy_(rows)
            copies[name] = staged(self._buffers[name], tensor, self._writers.messages)
        self._pending = self._writer.submit(self._write, step, copies, metadata)

    def _write(self, step: int, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        path = self.checkpoint(step)
        if self.writes_folders:
            write_folder(tensors, metadata, path, self._writers)
        else:
            write_safetensors(tensors, metadata, path)
            with writing(path):
                commit(path)
        self._writers.lead(partial(self._drop_all_but, path))

    def _drop_all_but(self, newest: Path) -> None:
        """Delete all but the newest checkpoints and the best ones that they refer to."""
        kept = {newest, *newest_first(self.path)[: self.keep]}
        bests = set()
        for path in kept:  # a torn one, or one without a best, refers to none
            with suppress(InputError, LookupError, TypeError):
                if (best := read_extra(path)["best"]["step"]) is not None:
                    bests.add(self.checkpoint(best))
        with writing(newest):
            for path in set(newest_first(self.path)) - kept - bests:
                discard(path)

    @property
    def failed(self) -> bool:
        """True if the last save is known to have failed."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def wait(self) -> None:
        """Wait until the last save is on disk. Raises EnvironmentFault if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def checkpoint(self, step: int) -> Path:
        """Return the path of a step's checkpoint; one copied from another run is a file."""
        file = self.path / f"step-{step:08d}.safetensors"
        return file.with_suffix("") if self.writes_folders and not file.exists() else file

    def unlock(self) -> None:
        """Finish a save in flight, whether or not it succeeds, and let others use the folder."""
        try:
            with suppress(Exception):  # the error that ends the run is reported already
                self.wait()
        finally:
            self._writer.shutdown()
            if self._lock is not None:
                self._lock.close()


def _require_shared(folder: Path, processes: Processes) -> None:
    """Raise EnvironmentFault, in all processes, unless each sees a file that rank 0 writes."""

    def write() -> Path:
        probe = folder / f".tmp-{uuid4().hex}"
        with writing(probe):
            probe.touch()
        return probe

    def see() -> None:
        if not probe.exists():
            raise EnvironmentFault(
                f"{folder.resolve()}: not the folder in which rank 0 writes; start all "
                "processes in one folder that every host sees"
            )

    probe = processes.lead(write)
    processes.together(see)
    processes.lead(probe.unlink)


def kept_checkpoints(
    folder: Path, processes: Processes = ALONE
) -> Iterator[tuple[Path, str | None]]:
    """Yield the checkpoints of a run, newest first, each with its fault or None."""
    for path in processes.lead(lambda: newest_first(folder)):
        fault = None
        try:
            verify(path, processes)
        except (InputError, FileNotFoundError) as error:  # a training process may delete it
            fault = str(error)
        yield path, next(filter(None, processes.gather(fault)), None)


def _require_kind(path: Path, folder: bool) -> None:
    """Raise InputError if something is there that is not a folder, or not a file.

    A link would redirect what is written or deleted, and a pipe would block.
    """
    if path.is_symlink() or (path.exists() and not (path.is_dir() if folder else path.is_file())):
        kind = "a link" if path.is_symlink() else f"not a {'folder' if folder else 'file'}"
        raise InputError(f"{path}: {kind}; move it away: only this project writes there")


def newest_first(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, committed or not, the newest first."""
    found = (path for path in folder.glob("step-*") if path.suffix in ("", ".safetensors"))
    return sorted(found, key=lambda path: path.stem, reverse=True)


def _begin_thread(gpu: int | None) -> None:
    """Use the GPU of this process, not the first one; leave the CPU to training's threads."""
    if gpu is not None:
        torch.cuda.set_device(gpu)
    if sys.platform == "linux":  # where a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
