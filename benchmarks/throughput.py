"""Measure training speed beside nanoGPT, Hugging Face and the machine's limit, by shape.

    python -m benchmarks.throughput [--shapes S S10k M L] [--rounds N]      (make bench)

Each contestant is a process of its own and runs its real loop, from the batch to the updated
weights, on the same file of random token ids with the same number of threads. Slices of a few
steps take turns, so that all see the same machine; medians count. NANOGPT names a clone of nanoGPT.

floor           only the matrix products of a step of that shape, attention without its mask
share of floor  time of the floor in the same dtype, divided by the contestant's
peak MB         memory of the process; "own" is without the import of torch
first step      from the start of the process; includes compiling with an empty cache
"""

import argparse
import statistics
from contextlib import ExitStack
from typing import Any

import torch

from benchmarks.contestants import SHAPES, Shape
from benchmarks.worker import Failed, Worker, token_file
from lm.base.errors import one_line_errors
from lm.machine.device import describe

ALL = (
    "nanoGPT",
    "nanoGPT, compiled",
    "Hugging Face Llama",
    "by the book",
    "ours, float32",
    "ours, float32, compiled",
    "ours, bfloat16, compiled",
    "ours, bfloat16, compiled, Muon",
    "floor, float32",
    "floor, bfloat16",
)
HEADER = """
| {title} | ms | tokens/s | nanoGPT's ms / ms | share of floor | peak MB | own MB | first step s |
|---|--:|--:|--:|--:|--:|--:|--:|"""


def compare(
    shape: Shape, names: list[str], rounds: int, steps: int, threads: int
) -> dict[str, dict[str, Any]]:
    """Return for each contestant what Worker.start says, the median step_s, and its memory.

    Print a line for one that fails, and leave it out.
    """
    found: dict[str, dict[str, Any]] = {}
    with token_file(shape.vocab_size) as file, ExitStack() as stack:
        workers: dict[str, Worker] = {}

        def attempt(name: str, action: Any, *arguments: Any) -> Any:
            try:
                return action(*arguments)
            except Failed as failure:
                print(f"{name}: {failure}", flush=True)
                workers.pop(name, None)
                found.pop(name, None)

        for name in names:
            worker = stack.enter_context(Worker(name, shape, file, threads=threads))
            if said := attempt(name, worker.start):
                workers[name], found[name] = worker, said
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(rounds):
            for name, worker in list(workers.items()):
                seconds[name] += attempt(name, worker.run, steps) or []
        for name, worker in list(workers.items()):
            if memory := attempt(name, worker.memory):
                found[name] |= memory | {"step_s": statistics.median(seconds[name])}
    return found


def table(title: str, shape: Shape, found: dict[str, dict[str, Any]]) -> str:
    """Return Markdown; a cell is empty if what it compares with is missing."""
    lines = [HEADER.format(title=title)]
    for name, values in found.items():
        step_s = values["step_s"]
        floor = found.get("floor, bfloat16" if "bfloat16" in name else "floor, float32")
        shared = floor and not name.startswith(("nanoGPT", "floor"))  # nanoGPT has others
        cells = [
            f"{step_s * 1e3:.1f}",
            f"{shape.tokens / step_s:,.0f}",
            f"{found['nanoGPT']['step_s'] / step_s:.2f}" if "nanoGPT" in found else "",
            f"{floor['step_s'] / step_s:.2f}" if floor and shared else "",
            f"{values['peak_bytes'] / 1e6:,.0f}",
            f"{values['own_bytes'] / 1e6:,.0f}",
            f"{values['first_s']:.1f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["S", "S10k", "M", "L"], choices=SHAPES)
    parser.add_argument("--contestants", nargs="+", default=ALL, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=6, help="in a slice")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    with one_line_errors():
        torch.set_num_threads(options.threads)
        print(f"{describe(torch.device('cpu'))}, torch {torch.__version__}", flush=True)
        for name in options.shapes:
            shape = SHAPES[name]
            rounds, steps = options.rounds, options.steps
            found = compare(shape, list(options.contestants), rounds, steps, options.threads)
            print(table(f"{name} {tuple(shape)}", shape, found))
            if found:
                sizes = {f"{name} {v['parameters']:,}": 0 for name, v in found.items()}
                importing = statistics.median(v["import_s"] for v in found.values())
                held = statistics.median(v["import_bytes"] for v in found.values()) / 1e6
                print(f"\nImporting torch: {importing:.1f} s, {held:.0f} MB. {'; '.join(sizes)}.")


if __name__ == "__main__":
    main()
