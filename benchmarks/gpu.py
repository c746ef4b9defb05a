"""Everything again on a GPU: speed, MFU and memory beside nanoGPT, and how long 17M would take.

    python -m benchmarks.gpu [--device cuda] [--seconds 60]      (make bench-gpu)
    python -m benchmarks.gpu --device cpu --seconds 2            (does it run? tiny numbers)

Each contestant is a process of its own, alone on the device. The batch grows until nothing fits
any more. nanoGPT is as it stands: bfloat16, its flash attention, torch.compile. ddp and fsdp are
of one process: what they cost before a second one gains anything.
MFU is the share of the rate of a large bfloat16 product, measured here and now.
"""

import argparse
from typing import Any

import torch

from benchmarks.contestants import SHAPES, Shape
from benchmarks.worker import Failed, Worker, token_file
from lm.base.errors import one_line_errors
from lm.machine.device import choose_device, describe
from lm.machine.gauges import matmul_flops_per_second

NAMES = (
    "nanoGPT, bfloat16, compiled",
    "ours, bfloat16",
    "ours, bfloat16, compiled",
    "ours, bfloat16, compiled, Muon",
    "ours, bfloat16, compiled, checkpointing",
    "ours, bfloat16, compiled, ddp",
    "ours, bfloat16, compiled, fsdp",
)
STORIES = Shape(10_000, 512, 4, 16, 1344, 256, 128)  # 17M parameters on TinyStories
STORY_TOKENS = 327_680_000
SHARE = 1 / 6  # of the seconds, for each row of the tables


def measured(
    name: str, shape: Shape, device: torch.device, seconds: float
) -> dict[str, Any] | None:
    """What Worker.measure finds; None, told in a line, if it fails."""
    try:
        with token_file(shape.vocab_size) as file, Worker(name, shape, file, device.type) as worker:
            return worker.measure(seconds)
    except Failed as failure:
        print(f"{name}, batch {shape.batch_size}: {failure}", flush=True)
        return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=60, help="of the long measurement")
    parser.add_argument("--contestants", nargs="+", default=NAMES, metavar="NAME")
    options = parser.parse_args()
    with one_line_errors():
        device = choose_device(options.device)
        peak = matmul_flops_per_second(device, "bfloat16")
        product = f"bfloat16 product {peak / 1e12:,.1f} TFLOP/s"
        print(f"{describe(device)}, torch {torch.__version__}; {product}", flush=True)
        tiny = device.type == "cpu"
        for title in ("XS",) if tiny else ("L", "G"):
            growing(title, options.contestants, device, options.seconds * SHARE, peak, tiny)
        ours = [name for name in options.contestants if name.startswith("ours")]
        stories(SHAPES["XS"] if tiny else STORIES, ours, device, options.seconds)


def growing(
    title: str, names: list[str], device: torch.device, seconds: float, peak: float, tiny: bool
) -> None:
    """One table: every batch that fits, doubled from the shape's own."""
    shape, left = SHAPES[title], list(names)
    last = shape.batch_size * (2 if tiny else 1 << 10)
    print(f"\n| {title} {tuple(shape)} | batch | ms | tokens/s | MFU | peak MB | first step s |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    while left and shape.batch_size <= last:
        for name in list(left):
            found = measured(name, shape, device, seconds)
            if found is None:
                left.remove(name)
                continue
            speed = shape.tokens / found["step_s"]
            cells = [
                f"{shape.batch_size}",
                f"{found['step_s'] * 1e3:.1f}",
                f"{speed:,.0f}",
                f"{speed * found['flops_per_token'] / peak:.2f}",
                f"{found['peak_bytes'] / 1e6:,.0f}",
                f"{found['first_s']:.0f}",
            ]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
        shape = shape._replace(batch_size=2 * shape.batch_size)


def stories(shape: Shape, names: list[str], device: torch.device, seconds: float) -> None:
    """How long all tokens of the TinyStories setting would take at the measured rate."""
    title = f"{STORY_TOKENS:,} tokens, {tuple(shape)}"
    print(f"\n| {title} | measured s | tokens/s | first step s | in all, minutes |")
    print("|---|--:|--:|--:|--:|")
    for name in names:
        found = measured(name, shape, device, seconds)
        if found is not None:
            speed = shape.tokens / found["step_s"]
            minutes = (STORY_TOKENS / speed + found["first_s"]) / 60
            start = f"{found['first_s']:.0f}"
            print(f"| {name} | {seconds:.0f} | {speed:,.0f} | {start} | {minutes:,.1f} |")


if __name__ == "__main__":
    main()
