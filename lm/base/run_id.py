"""The id of a training run, a hash of all that decides its result, and the paths named by it.

.dvc/tmp/lm-resume/RUN_ID/     the run folder: see lm/runs/run_folder.py
.dvc/tmp/lm-clock/RUN_ID.csv   the times of the run's steps
"""

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


def run_id(identity: dict[str, Any]) -> str:
    """Return the id of the run with this identity."""
    return sha256_json(fixed_parts(identity))[:32]


def fixed_parts(identity: dict[str, Any]) -> dict[str, Any]:
    """Return the identity of a run without the parts that may change during it."""
    may_change = (MICRO_BATCH_SIZES, NUM_PROCESSES)
    return {part: value for part, value in identity.items() if part not in may_change}


def run_folder(runs_root: Path, identity: dict[str, Any]) -> Path:
    """Return the run folder; `runs_root` is the folder above all of them."""
    return runs_root / run_id(identity)


def clock_file(runs_root: Path, identity: dict[str, Any]) -> Path:
    """Return the file of the times of a run's steps; it outlives the run folder."""
    return runs_root.with_name("lm-clock") / f"{run_id(identity)}.csv"


def remove_finished(folder: Path) -> None:
    """Delete the folder of a run whose outputs are recorded, unless a process is using it."""
    if folder.is_dir():
        with suppress(Busy):
            lock = locked(folder)
            shutil.rmtree(folder)
            lock.close()


def locked(folder: Path) -> Any:
    """Make and lock a run folder; return the open file that holds the lock.

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
    if os.fstat(lock.fileno()).st_nlink == 0:  # the folder was removed just now
        lock.close()
        return locked(folder)
    with writing(folder / "lock"):
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
    return lock
