"""Run a grid of settings and seeds: `make sweep SET=train.lr=3e-3,6e-3 SEEDS=1,2,3`.

No stage of dvc.yaml: `make sweep` calls it, after tools.heal. Each point of the grid becomes a
queued experiment (`dvc exp run --queue`), one worker runs one after the other (several race:
treeverse/dvc#10673), and compare.py says what they show. A point that HEAD's experiments have,
or that is queued or running, is not queued again: a sweep that was stopped goes on. One that
diverged is a result too. Ctrl-C and SIGTERM stop the worker too; its training saves its state.
"""

import argparse
import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from lm.base.config import load_params
from lm.base.console import duration, say
from lm.base.errors import EnvironmentFault, InputError, Interrupted, one_line_errors
from stages import CODE as FOLDERS
from stages.run import PARAMS
from tools.experiments.compare import report, write
from tools.experiments.read import (
    CODE,
    SEED,
    TEXT,
    Experiment,
    deciding,
    divergence,
    flat,
    last_lines,
    read_experiments,
)
from tools.heal.heal import heal
from tools.repository import git, opened

DONE, UNDER_WAY = ("success", "baseline"), ("queued", "running")
ENDED = (*DONE, "diverged")  # with a result: again it would end in the same way
# what may differ between commits that give the same results; a queued one has DVC's arguments
NOT_CODE = (":!params.yaml", ":!dvc.lock", ":!docs", ":!*.md", ":!.dvc/tmp")
STOP_SECONDS, MAX_STARTS = 30, 3
# in its log: how an experiment ended
LAST_WORDS = ("Validation loss", "Stage 'evaluate' is cached", "error:", "stopped")


def sweep(axes: list[str]) -> None:
    """Run what is missing of the grid, and report. Raises InputError if an experiment failed."""
    grid = points(axes)
    after = run_all(grid)
    try:
        write(*report(after, None))
    except InputError as error:
        if all(find(after, p, DONE) for p in grid):
            raise
        say(str(error))
    require_results(after, grid, "make sweep")


def require_results(
    experiments: list[Experiment], grid: Collection[tuple[str, ...]], command: str
) -> None:
    """Raise InputError if an experiment of the grid failed: which, and the command to repeat."""
    failed = [
        " ".join([*point, *(f"({e.name})" for e in find(experiments, point, ("failed",)))])
        for point in grid
        if not find(experiments, point, ENDED)
    ]
    if failed:
        raise InputError(
            f"{len(failed)} of {len(grid)} experiments failed: {', '.join(failed)}; "
            f"`dvc queue logs NAME` shows why, `{command}` runs them again"
        )


def run_all(grid: list[tuple[str, ...]]) -> list[Experiment]:
    """Run what is missing of some points; return all experiments of HEAD after it."""
    before = read_experiments([])
    if changed := git("diff", "--name-only", "HEAD", "--", ".", ":!dvc.lock").split("\n")[:-1]:
        say(f"Not committed, the experiments take it along: {', '.join(changed)}")
    if new := git("ls-files", "-o", "--exclude-standard", *FOLDERS).split("\n")[:-1]:
        say(f"Not in git, the experiments lack it: {', '.join(new)}")
    missing = [p for p in grid if not find(before, p, ENDED + UNDER_WAY)]
    say(f"{len(grid)} in the grid, {len(missing)} to queue")
    queue(missing, stale=[e.rev for p in missing for e in find(before, p, ("failed",))])
    now = read_experiments([])
    labels = {e.rev: " ".join(p) for p in grid for e in find(now, p, UNDER_WAY)}
    wait(labels)
    return read_experiments([])


def points(axes: list[str]) -> list[tuple[str, ...]]:
    """Return every combination, as section.key=value; seed by seed, so each round is complete."""
    several = []
    for axis in axes:
        key, _, values = axis.partition("=")
        if not all(values.split(",")):
            raise InputError(f"{axis}: expected section.key=value,value, as in train.lr=1e-3,3e-3")
        several.append(dict.fromkeys(f"{key}={value}" for value in values.split(",")))
    seed = f"{SEED}="
    return sorted(itertools.product(*several), key=lambda p: [v for v in p if v.startswith(seed)])


def find(
    experiments: list[Experiment], point: tuple[str, ...], states: tuple[str, ...]
) -> list[Experiment]:
    """Return the experiments in a state, of these settings and the code of the workspace."""
    wanted = deciding(flat(load_params(PARAMS, point)))
    return [
        e
        for e in experiments
        if e.state in states
        and deciding(e.params) == wanted
        and (e.state not in DONE or e.metrics)
        and all(wanted.get(k) == value for k, value in e.made_by.items() if k not in (CODE, TEXT))
        and git("diff", "--name-only", e.rev, "--", ".", *NOT_CODE) == ""
    ]


def queue(missing: list[tuple[str, ...]], stale: list[str]) -> None:
    """`dvc exp run --queue -S ...` for each, after `dvc queue remove` of what failed before."""
    from dvc.repo.experiments.exceptions import UnresolvedExpNamesError

    with opened() as repo:
        for rev in stale * 2:  # what was killed early leaves DVC's stash first, then its list
            with suppress(UnresolvedExpNamesError):
                repo.experiments.celery_queue.remove([rev])
        for point in missing:
            repo.experiments.run(queue=True, params=list(point))


def wait(labels: dict[str, str]) -> None:
    """Let a worker run the queue until these experiments have ended; say how each did.

    A worker that dies is started again. Raises Interrupted once Ctrl-C has stopped the worker.
    """
    with opened() as repo:
        tasks = repo.experiments.celery_queue
        try:
            follow(tasks, labels)
        except KeyboardInterrupt:
            stop_worker(tasks)
            message = "stopped, training is saved; run the same command again to go on"
            raise Interrupted(signal.SIGINT, message) from None


def follow(tasks: Any, labels: dict[str, str]) -> None:
    """Wait for the experiments of these revisions, with a worker."""
    left, began = dict(labels), dict[str, float]()
    starts = 0  # without a result since
    bar = tqdm(total=len(left), unit="experiment", disable=not sys.stderr.isatty(), leave=False)
    while left:
        if not has_worker():
            if starts == MAX_STARTS:
                where = Path(tasks.wdir, "dvc-exp-worker-1.out")
                raise EnvironmentFault(f"DVC's worker ends before its work, see {where}")
            starts += 1
            start_worker()
        queued = {entry.stash_rev for entry in tasks.iter_queued()}  # first, since they move on
        active = {entry.stash_rev for entry in tasks.iter_active()}
        for rev in list(left):
            if rev in active:
                began.setdefault(rev, time.monotonic())
                bar.set_postfix_str(f"{left[rev]}: {(last_lines(tasks, rev) or ['starts'])[-1]}")
            elif rev not in queued:
                lines = last_lines(tasks, rev)
                words = [line for line in lines if line.startswith(LAST_WORDS)] or lines
                end = divergence(lines) or (words or ["no output"])[-1]
                took = duration(time.monotonic() - began.get(rev, time.monotonic()))
                what = f"{left.pop(rev)}: {end} ({took})"
                say(f"[{len(labels) - len(left)}/{len(labels)}] {what}")
                bar.update()
                starts = 0
        time.sleep(0.5)
    bar.close()


def start_worker() -> None:
    """`dvc queue start`, after healing: a worker that died has left its task "Running".

    In silence, because the worker keeps our output open. If one is just ending, none is started.
    """
    for line in heal(Path.cwd()):
        say(f"healed: {line}")
    command, nowhere = ["dvc", "queue", "start", "--jobs", "1"], subprocess.DEVNULL
    if subprocess.run(command, stdout=nowhere, stderr=nowhere, check=False).returncode != 0:
        raise EnvironmentFault(f"`{' '.join(command)}` fails; run it to see why")


def has_worker() -> bool:
    """Return whether a worker of this project lives, or is being started."""
    for process in psutil.process_iter(["cmdline", "status"]):
        words = set(process.info["cmdline"] or [])
        if "queue-worker" in words or {"dvc", "queue", "start"} <= {Path(w).name for w in words}:
            with suppress(psutil.Error):
                alive = process.info["status"] != psutil.STATUS_ZOMBIE
                if alive and Path(process.cwd()).is_relative_to(Path.cwd()):
                    return True
    return False


def stop_worker(tasks: Any) -> None:
    """`dvc queue stop --kill`, repeated: the worker may begin another task before it listens."""
    from dvc.exceptions import DvcException

    tasks.shutdown()
    end = time.monotonic() + STOP_SECONDS
    while has_worker():
        if time.monotonic() > end:
            raise EnvironmentFault("DVC's worker does not stop; see `dvc queue status`")
        with suppress(DvcException):  # it has just ended, or not quite begun
            tasks.kill([entry.stash_rev for entry in tasks.iter_active()], force=True)
        time.sleep(0.1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("axes", nargs="+", metavar="section.key=value,value")
    axes = parser.parse_args().axes
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with one_line_errors():
        sweep(axes)
