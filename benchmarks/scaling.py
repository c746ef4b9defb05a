"""Measure how a step of ours grows with the model: vary one size; compare FLOPs and time.

    python -m benchmarks.scaling [--around M] [--contestant "ours, float32"] [--sizes d_model ...]

If GFLOP/s stay the same, time follows the FLOPs; if they fall, something else costs time. d_ff and
the number of heads follow d_model. Each row is a process of its own and compiles anew if it does.
"""

import argparse

import torch

from benchmarks.contestants import SHAPES, Shape
from benchmarks.worker import Failed, Worker, token_file
from lm.base.errors import one_line_errors
from lm.machine.device import describe
from lm.machine.gauges import matmul_flops_per_second

FACTORS = (0.5, 1, 2, 4)
SIZES = ("d_model", "num_layers", "context_length", "batch_size", "vocab_size")


def scaled(shape: Shape, size: str, factor: float) -> Shape:
    """Return the shape with one size multiplied, and with it the sizes in proportion to it."""
    together = ("d_model", "num_heads", "d_ff") if size == "d_model" else (size,)
    return shape._replace(**{name: max(1, int(getattr(shape, name) * factor)) for name in together})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--around", default="M", choices=SHAPES)
    parser.add_argument("--contestant", default="ours, float32", metavar="NAME")
    parser.add_argument("--sizes", nargs="+", default=SIZES, choices=SIZES)
    parser.add_argument("--factors", nargs="+", default=FACTORS, type=float)
    parser.add_argument("--seconds", type=float, default=3, help="seconds to measure each row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    with one_line_errors():
        base = SHAPES[options.around]
        torch.set_num_threads(options.threads)
        cpu = torch.device("cpu")
        dtype = "bfloat16" if "bfloat16" in options.contestant else "float32"
        peak = matmul_flops_per_second(cpu, dtype) / 1e9  # type: ignore[arg-type]
        print(f"{describe(cpu)}, torch {torch.__version__}; {dtype} product {peak:.0f} GFLOP/s")
        print(f"{options.contestant}, around {options.around} {tuple(base)}")
        for size in options.sizes:
            one_size(base, size, options)


def one_size(base: Shape, size: str, options: argparse.Namespace) -> None:
    """Print one table; ratios are to its first row."""
    print(f"\n| {size} | ms | MFLOP a step | GFLOP/s | FLOPs, ratio | time, ratio |")
    print("|--:|--:|--:|--:|--:|--:|")
    first: tuple[float, float] | None = None
    for factor in options.factors:
        shape = scaled(base, size, factor)
        try:
            with (
                token_file(shape.vocab_size) as file,
                Worker(options.contestant, shape, file, threads=options.threads) as worker,
            ):
                found = worker.measure(options.seconds)
        except Failed as failure:
            print(f"{size} {getattr(shape, size)}: {failure}", flush=True)
            continue
        flops, step_s = found["flops_per_token"] * shape.tokens, found["step_s"]
        first = first or (flops, step_s)
        cells = [f"{step_s * 1e3:.1f}", f"{flops / 1e6:,.0f}", f"{flops / step_s / 1e9:.1f}"]
        cells += [f"{flops / first[0]:.2f}", f"{step_s / first[1]:.2f}"]
        print(f"| {getattr(shape, size):,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
