"""Run a grid of settings and seeds: `make sweep SET=train.lr=3e-3,6e-3 SEEDS=1,2,3`.

`make sweep` calls it after tools.heal. Queue each point of the grid that HEAD's experiments lack
(`dvc exp run --queue`), so that a stopped sweep goes on. Let one worker run them (several would
race: treeverse/dvc#10673). Then compare the results; a run that diverged counts as one. Ctrl-C and
SIGTERM stop the worker, too, and its training saves its state.
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

from lm.base.console import duration, say
from lm.base.errors import EnvironmentFault, InputError, Interrupted, one_line_errors
from lm.base.params import load_params
from lm.base.paths import PARAMS
from stages import CODE as FOLDERS
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

Point = tuple[str, ...]  # of the grid: settings as `dvc exp run -S` takes them
DONE, UNDER_WAY = ("success", "baseline"), ("queued", "running")
ENDED = (*DONE, "diverged")  # with a result: another run would end in the same way
# may differ between commits with one code; a queued commit has DVC's arguments in .dvc/tmp
NOT_CODE = (":!params.yaml", ":!dvc.lock", ":!docs", ":!*.md", ":!.dvc/tmp")
STOP_SECONDS, MAX_STARTS = 30, 3
# the lines of its log that say how an experiment ended
LAST_WORDS = ("Validation loss", "Stage 'evaluate' is cached", "error:", "stopped")


def sweep(axes: list[str]) -> None:
    """Run the missing points and compare all. Raises InputError if an experiment failed."""
    grid = points(axes)
    after = run_all(grid)
    try:
        write(*report(after, None))
    except InputError as error:
        if all(find(after, p, DONE) for p in grid):
            raise
        say(str(error))
    require_results(after, grid, "make sweep")


def require_results(experiments: list[Experiment], grid: Collection[Point], command: str) -> None:
    """Raise InputError if an experiment of the grid failed; name it and the command to repeat."""
    failed = []
    for point in grid:
        if not find(experiments, point, ENDED):
            names = [f"({e.name})" for e in find(experiments, point, ("failed",))]
            failed.append(" ".join([*point, *names]))
    if failed:
        raise InputError(
            f"{len(failed)} of {len(grid)} experiments failed: {', '.join(failed)}; "
            f"`dvc queue logs NAME` shows why, `{command}` runs them again"
        )


def run_all(grid: list[Point]) -> list[Experiment]:
    """Run the points that have no result yet; then return all experiments of HEAD.

    Raises Interrupted once Ctrl-C has stopped the worker.
    """
    from dvc.repo.experiments.exceptions import UnresolvedExpNamesError

    before = read_experiments([])
    if changed := git("diff", "--name-only", "HEAD", "--", ".", ":!dvc.lock").split("\n")[:-1]:
        say(f"Not committed, but the experiments use it: {', '.join(changed)}")
    if new := git("ls-files", "-o", "--exclude-standard", *FOLDERS).split("\n")[:-1]:
        say(f"Not in git, so the experiments lack it: {', '.join(new)}")
    missing = [p for p in grid if not find(before, p, ENDED + UNDER_WAY)]
    say(f"{len(grid)} in the grid, {len(missing)} to queue")
    stale = [e.rev for p in missing for e in find(before, p, ("failed",))]
    with opened() as repo:
        tasks = repo.experiments.celery_queue
        for rev in stale * 2:  # a task killed early is in DVC's stash and in its list: remove both
            with suppress(UnresolvedExpNamesError):
                tasks.remove([rev])
        for point in missing:
            repo.experiments.run(queue=True, params=list(point))
        now = read_experiments([])
        labels = {e.rev: " ".join(p) for p in grid for e in find(now, p, UNDER_WAY)}
        try:
            follow(tasks, labels)
        except KeyboardInterrupt:
            stop_worker(tasks)
            message = "stopped, training is saved; run the same command again to go on"
            raise Interrupted(signal.SIGINT, message) from None
    return read_experiments([])


def points(axes: list[str]) -> list[Point]:
    """Return every combination, as section.key=value, sorted by seed: each round is complete."""
    several = []
    for axis in axes:
        key, _, values = axis.partition("=")
        if not all(values.split(",")):
            raise InputError(f"{axis}: expected section.key=value,value, as in train.lr=1e-3,3e-3")
        several.append(dict.fromkeys(f"{key}={value}" for value in values.split(",")))
    grid = itertools.product(*several)
    return sorted(grid, key=lambda point: [v for v in point if v.startswith(f"{SEED}=")])


def find(experiments: list[Experiment], point: Point, states: tuple[str, ...]) -> list[Experiment]:
    """Return the experiments in these states that have these settings and the workspace's code."""
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


def follow(tasks: Any, labels: dict[str, str]) -> None:
    """Let a worker run the queue until the experiments of these revisions have ended.

    Print how each ended. Restart a worker that dies.
    """
    left, began = dict(labels), dict[str, float]()
    starts = 0  # since the last result
    bar = tqdm(total=len(left), unit="experiment", disable=not sys.stderr.isatty(), leave=False)
    while left:
        if not has_worker():
            if starts == MAX_STARTS:
                where = Path(tasks.wdir, "dvc-exp-worker-1.out")
                raise EnvironmentFault(f"DVC's worker ends before its work is done; see {where}")
            starts += 1
            start_worker()
        queued = {entry.stash_rev for entry in tasks.iter_queued()}  # first: they become active
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
    """Heal, since a worker that died has left its task "Running"; then start a worker.

    Discard its output, because it would keep ours open. DVC starts none while another is ending.
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
    """Stop the worker and kill its tasks: it may begin one more before it obeys."""
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
