"""The folders of training runs: one for each run, named by the hash of its identity."""

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from lm.base.errors import Busy
from lm.base.files import sha256_json, writing

# parts of an identity that may change during a run: each value by the first step that had it
MICRO_BATCH_SIZES, NUM_PROCESSES = "micro_batch_sizes", "num_processes"


def run_folder(unfinished: Path, identity: dict[str, Any]) -> Path:
    """Return the folder of the run with this identity."""
    return unfinished / sha256_json(decided(identity))[:32]


def decided(identity: dict[str, Any]) -> dict[str, Any]:
    """Return the identity of a run without the parts that may change on its way."""
    may_change = (MICRO_BATCH_SIZES, NUM_PROCESSES)
    return {part: value for part, value in identity.items() if part not in may_change}


def clock_file(unfinished: Path, identity: dict[str, Any]) -> Path:
    """Return the file that keeps the times of a run's steps, longer than the run's folder."""
    return unfinished.with_name("lm-clock") / f"{run_folder(unfinished, identity).name}.csv"


def remove_finished(folder: Path) -> None:
    """Delete the folder of a run whose outputs are recorded, unless a process uses it."""
    if folder.is_dir():
        with suppress(Busy):
            lock = locked(folder)
            shutil.rmtree(folder)
            lock.close()


def locked(folder: Path) -> Any:
    """Make and lock a run's folder; return the open file that holds the lock.

    Raises Busy if another process holds it.
    """
    with writing(folder / "lock"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "a+")  # noqa: SIM115 - held until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise Busy(f"{folder}: process {holder} is training this run; wait or stop it") from None
    if os.fstat(lock.fileno()).st_nlink == 0:  # the folder was removed in this very moment
        lock.close()
        return locked(folder)
    with writing(folder / "lock"):
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
    return lock
