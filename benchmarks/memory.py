"""Measure peak memory of training, ours and others', at the same micro-batch size.

    python -m benchmarks.memory [--shapes L long] [--contestants NAME ...]

Each contestant is a process of its own, alone on the machine, for a few steps. "own" is the peak
without the import of torch: parameters, gradients, optimizer, activations.
"""

import argparse

import torch

from benchmarks.contestants import CHECKPOINTING, SHAPES
from benchmarks.worker import Failed, Worker, token_file
from lm.base.errors import one_line_errors
from lm.machine.device import describe

OURS = ("ours, float32", "ours, float32, compiled", "ours, bfloat16, compiled")
PEERS = ("nanoGPT", "nanoGPT, compiled", "Hugging Face Llama", "by the book")
ALL = (*PEERS, *(name + kind for name in OURS for kind in ("", CHECKPOINTING)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["L", "long"], choices=SHAPES)
    parser.add_argument("--contestants", nargs="+", default=ALL, metavar="NAME")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    with one_line_errors():
        torch.set_num_threads(options.threads)
        print(f"{describe(torch.device('cpu'))}, torch {torch.__version__}")
        for shape in options.shapes:
            one_shape(shape, options.contestants, options.steps, options.threads)


def one_shape(title: str, names: list[str], steps: int, threads: int) -> None:
    """Print one table; ratios are of the own memory."""
    shape = SHAPES[title]
    print(f"\n| {title} {tuple(shape)} | peak MB | own MB | of leanest peer | of without | ms |")
    print("|---|--:|--:|--:|--:|--:|")
    own: dict[str, float] = {}
    with token_file(shape.vocab_size) as file:
        for name in names:
            try:
                with Worker(name, shape, file, threads=threads) as worker:
                    worker.start()
                    step_s = min(worker.run(steps))
                    memory = worker.memory()
            except Failed as failure:
                print(f"{name}: {failure}", flush=True)
                continue
            own[name] = memory["own_bytes"] / 1e6
            leanest = min((own[peer] for peer in PEERS if peer in own), default=None)
            without = own.get(name.removesuffix(CHECKPOINTING)) if CHECKPOINTING in name else None
            cells = [f"{memory['peak_bytes'] / 1e6:,.0f}", f"{own[name]:,.0f}"]
            cells += [f"{own[name] / other:.2f}" if other else "" for other in (leanest, without)]
            print(f"| {name} | {' | '.join(cells)} | {step_s * 1e3:.0f} |", flush=True)


if __name__ == "__main__":
    main()
