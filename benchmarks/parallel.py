"""Measure what training in several processes costs and gains here: a table for each question.

    python -m benchmarks.parallel [--tables eager compiled checkpoint] [--shapes S M] [--rounds N]

eager       float32, not compiled: ddp and fsdp of one process and of two, by sum and by tree
compiled    bfloat16, compiled, of one process: none as one graph, ddp and fsdp block by block
checkpoint  one process saves a file, two save a folder; 272 MB, whatever --shapes

Every process is a worker of its own, with one thread unless the row says otherwise. All exist at
once and take turns in slices of a few steps. The batch is the same in every row, shared by its
processes. "each for itself" are independent trainings of half a batch: the ceiling. Ratios compare
slices of the same round: median (smallest-largest).
"""

import argparse
import hashlib
import os
import socket
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestants import PARALLEL, SHAPES, Shape
from benchmarks.saver import Saver, seconds
from benchmarks.worker import Child, Failed, Worker, token_file
from lm.base.errors import one_line_errors
from lm.machine.device import describe

Place = dict[str, str]  # RANK and the like, the variables of the environment
TABLES = "eager", "compiled", "checkpoint"
FIRST = "none"
SAVED = SHAPES["L"]._replace(batch_size=2)  # 272 MB; a step is shorter than a save


@dataclass(frozen=True)
class Way:
    """A row: processes, the threads of each, and their settings of section train."""

    processes: int = 1
    threads: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    beside: str = ""  # the row that it is compared with besides the first

    @property
    def together(self) -> bool:
        """Return whether the processes train one model, not each its own."""
        return "parallel" in self.settings

    def places(self) -> list[Place]:
        """Return each process's variables of a launcher; none for one that trains for itself."""
        if self.processes == 1 or not self.together:
            return [{}] * self.processes
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(self.processes)}
        return [meet | {"RANK": str(rank)} for rank in range(self.processes)]


def eager_ways(batch_size: int) -> dict[str, Way]:
    """Return the rows for a batch of at least four windows."""
    ways = {
        FIRST: Way(),
        "none, once more": Way(),
        "none, 2 threads": Way(threads=2),
        "none, 2 processes, each for itself": Way(processes=2),
    }
    for parallel in PARALLEL:
        ways[parallel] = Way(settings={"parallel": parallel})
        plain = parallel
        for each, more in (1, ""), (2, ", 2 micro-batches each"):
            settings = {"parallel": parallel, "micro_batch_size": batch_size // 2 // each}
            by_sum, by_tree = (f"{parallel}, 2 processes, {r}{more}" for r in ("sum", "tree"))
            ways[by_sum] = Way(2, 1, settings | {"reduction": "sum"}, plain)
            ways[by_tree] = Way(2, 1, settings | {"reduction": "tree"}, by_sum)
            plain = by_sum
    return ways


COMPILED_WAYS = {
    FIRST: Way(),
    "none, once more": Way(),
    **{parallel: Way(settings={"parallel": parallel}) for parallel in PARALLEL},
}
SAVING_WAYS = {
    FIRST: Way(),
    "none, 2 threads": Way(threads=2),
    **{f"{p}, 2 processes": Way(2, 1, {"parallel": p}) for p in PARALLEL},
}


def measure(
    contestant: str, shape: Shape, ways: dict[str, Way], rounds: int, steps: int
) -> dict[str, list[float]]:
    """Return seconds of a step of each way: the median of its slice in each round."""
    taken: dict[str, list[float]] = {name: [] for name in ways}

    def worker(name: str, place: Place) -> Worker:
        way = ways[name]
        share = shape._replace(batch_size=shape.batch_size // way.processes)
        told = shape if way.together else share  # one training shares the batch by itself
        return Worker(contestant, told, file, "cpu", way.threads, place, **way.settings)

    with token_file(shape.vocab_size) as file, started(ways, worker) as (teams, _):
        for _ in range(rounds):
            for name, workers in teams.items():
                answers = ask(workers, steps=steps)
                taken[name].append(statistics.median(chain(*(a["seconds"] for a in answers))))
    return taken


@contextmanager
def started(
    ways: dict[str, Way], child_of: Callable[[str, Place], Child]
) -> Iterator[tuple[dict[str, list[Child]], dict[str, dict[str, Any]]]]:
    """Start the processes of each way; yield them, and the first answer of its first one."""
    with ExitStack() as stack:
        teams = {
            name: [stack.enter_context(child_of(name, place)) for place in way.places()]
            for name, way in ways.items()
        }
        for child in chain(*teams.values()):  # at once: those of one training wait for each other
            child.spawn()
        said = {name: [child.answer() for child in team] for name, team in teams.items()}
        yield teams, {name: first for name, (first, *_) in said.items()}


def ask(team: list[Child], **question: Any) -> list[dict[str, Any]]:
    """Ask all of them a question that they answer together; return the answers."""
    for child in team:
        child.request(**question)
    return [child.answer() for child in team]


def table(title: str, shape: Shape, ways: dict[str, Way], taken: dict[str, list[float]]) -> str:
    """Return Markdown; "of" another row is the ratio of tokens/s to that row's."""
    lines = [
        f"\n| {title} {tuple(shape)} | ms | tokens/s | of {FIRST} | of another row | which |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for name, way in ways.items():
        step_s = statistics.median(taken[name])
        cells = [f"{step_s * 1e3:.1f}", f"{shape.tokens / step_s:,.0f}"]
        for other in (FIRST, way.beside):
            cells.append(_ratios(taken[other], taken[name]) if other else "")
        lines.append(f"| {name} | {' | '.join(cells)} | {way.beside} |")
    return "\n".join(lines)


def _ratios(theirs: list[float], ours: list[float]) -> str:
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def measure_saving(
    shape: Shape, ways: dict[str, Way], parent: Path | None, rounds: int
) -> tuple[int, list[float], dict[str, list[dict[str, Any]]]]:
    """Return bytes of a checkpoint, seconds to write them plainly, and benchmarks.saver's times."""
    plain: list[float] = []
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}

    def saver(name: str, place: Place) -> Saver:
        settings = {"optimizer": "adamw", "dtype": "float32", "compile": False}
        settings |= ways[name].settings
        return Saver(shape, file, Path(scratch, name), ways[name].threads, place, **settings)

    with (
        token_file(shape.vocab_size) as file,
        tempfile.TemporaryDirectory(dir=parent) as scratch,
        started(ways, saver) as (teams, said),
    ):
        size = max(first["size_bytes"] for first in said.values())
        for _ in range(rounds):
            plain.append(write_plainly(Path(scratch, "plain"), os.urandom(size)))
            for name, savers in teams.items():
                found[name].append(ask(savers, steps=4)[0])
    return size, plain, found


def saving_table(size: int, plain: list[float], found: dict[str, list[dict[str, Any]]]) -> str:
    """Return Markdown; a training loses the time it waits and that which slower steps add."""
    plain_s = statistics.median(plain)
    lines = [
        f"\n| saving {size / 1e6:,.0f} MB | s | MB/s | of plain | a step waits s | "
        "step ms | meanwhile ms | ratio | training loses s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        f"| plain write, fsync, sha256 | {plain_s:.2f} | {size / plain_s / 1e6:,.0f} |",
    ]
    for name, rounds in found.items():
        waits = [times["wait_s"] for times in rounds]
        held_s = statistics.median(times["held_s"] for times in rounds)
        step_s = statistics.median(chain(*(times["alone_s"] for times in rounds)))
        slow_s = statistics.median(chain(*(times["meanwhile_s"] for times in rounds)))
        lost_s = [t["held_s"] + sum(s - step_s for s in t["meanwhile_s"]) for t in rounds]
        wait_s = statistics.median(waits)
        cells = [f"{wait_s:.2f}", f"{size / wait_s / 1e6:,.0f}", _ratios(plain, waits)]
        cells += [f"{held_s:.3f}", f"{step_s * 1e3:.0f}", f"{slow_s * 1e3:.0f}"]
        cells += [f"{slow_s / step_s:.2f}", f"{statistics.median(lost_s):.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_plainly(path: Path, data: bytes) -> float:
    """Return the seconds in which one thread writes, syncs and hashes the data."""

    def write() -> None:
        with open(path, "wb") as file:
            file.write(data)
            os.fsync(file.fileno())
        hashlib.sha256(data)

    return seconds(write)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tables", nargs="+", default=TABLES, choices=TABLES)
    parser.add_argument("--shapes", nargs="+", default=["S", "M"], choices=["S", "S10k", "M"])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=8, help="in a slice")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written")
    options = parser.parse_args()
    with one_line_errors():
        print(f"{describe(torch.device('cpu'))}, torch {torch.__version__}", flush=True)
        for name in options.tables:
            try:
                one_table(name, options)
            except Failed as failure:
                print(f"{name}: {failure}", flush=True)


def one_table(name: str, options: argparse.Namespace) -> None:
    """Measure a table and print it, for each shape."""
    if name == "checkpoint":
        print(saving_table(*measure_saving(SAVED, SAVING_WAYS, options.folder, options.rounds)))
        return
    contestant = {"eager": "ours, float32", "compiled": "ours, bfloat16, compiled"}[name]
    for title in options.shapes:
        shape = SHAPES[title]
        ways = eager_ways(shape.batch_size) if name == "eager" else COMPILED_WAYS
        taken = measure(contestant, shape, ways, options.rounds, options.steps)
        print(table(f"{title}, {name}", shape, ways, taken), flush=True)


if __name__ == "__main__":
    main()
