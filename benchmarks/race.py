"""Compare validation loss by steps and by time: nanoGPT's published setting for a CPU, and ours.

    python -m benchmarks.race [--text FILE] [--preset presets/NAME.yaml] [-S section.key=value ...]

nanoGPT: config/train_shakespeare_char.py with its README's changes for a CPU. Ours: a params file
as it is, except for the vocabulary. Both learn the characters of the first 90 % of a text and
validate on the same windows of the rest. Each is a process of its own, one after the other; time
for validation does not count. Without --text: all files of data/raw.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.worker import Child, Failed, Tell, begin
from lm.base.errors import InputError, one_line_errors
from lm.base.params import add_overrides
from lm.base.signals import sigterm_raises

SIZES = (128, 4, 4, 344, 64, 12)  # d_model, layers, heads, (d_ff), context, batch of nanoGPT's side


class Point(NamedTuple):
    seconds: float  # of training, after the first step
    step: int
    loss: float


class Curve(NamedTuple):
    start_s: float  # from the start of the process to the end of the first step
    points: list[Point]


# --- the contestants, each in a process ---------------------------------------------------


def nanogpt(vocab_size: int, folder: Path, max_iters: int) -> tuple[Iterator[float], Any, int]:
    """Return steps, a call for the logits of (x, y), and the number of steps."""
    import torch

    from benchmarks.contestants import NanoGPTSettings, Shape, nanogpt_model, nanogpt_steps

    shape, settings = Shape(vocab_size, *SIZES), NanoGPTSettings(lr_decay_iters=max_iters)
    model = nanogpt_model(shape, torch.device("cpu"), settings)
    steps = nanogpt_steps(model, shape, folder / "train.bin", torch.device("cpu"), settings)

    def logits(x: Any, y: Any) -> Any:
        model.eval()
        result = model(x, y)[0]
        model.train()
        return result

    return steps, logits, max_iters


def ours(vocab_size: int, folder: Path, preset: str, overrides: list[str]) -> Any:
    """Return the same for lm.train.loop.train with the settings of a params file."""
    import torch

    from lm.base.params import load_params
    from lm.base.sections import read_section
    from lm.base.settings import TrainSection
    from lm.data.splits import Split
    from lm.machine.device import autocast, prepare
    from lm.model.transformer import ModelConfig
    from lm.plan.plan import make_plan
    from lm.train.loop import train
    from lm.train.state import new_state

    params = load_params(Path(preset), overrides)
    asked = read_section(TrainSection, params, "train")
    device = torch.device("cpu")
    prepare(device, asked.num_threads)
    model_config = read_section(ModelConfig, params, "model", vocab_size=vocab_size)
    config = make_plan(model_config, asked, device).config
    state = new_state(model_config, config, device)
    records = train(state, Split("train", read_ids(folder / "train.bin"), 0), config)

    def logits(x: Any, y: Any) -> Any:
        state.model.eval()
        with autocast(device, config.dtype):
            return state.model(x)

    return (record["train_loss"] for record in records), logits, config.max_steps


def validation_loss(logits: Callable[[Any, Any], Any], ids: NDArray[Any], length: int) -> float:
    """Return the mean loss in nats over all positions of adjoining windows."""
    import torch
    import torch.nn.functional as F

    count = (len(ids) - 1) // length
    x, y = (torch.from_numpy(ids[k : k + count * length]).view(count, length) for k in (0, 1))
    nats = 0.0
    with torch.no_grad():
        for some_x, some_y in zip(x.split(64), y.split(64), strict=True):
            flat = logits(some_x, some_y).float().flatten(0, 1)
            nats += F.cross_entropy(flat, some_y.flatten(), reduction="sum").item()
    return nats / (count * length)


def read_ids(file: Path) -> NDArray[np.int64]:
    return np.fromfile(file, dtype=np.uint16).astype(np.int64)


def child() -> None:
    """Train to the end; report the first step, then each validation, then the end."""
    job, tell = begin()
    run(job, tell)


def run(job: dict[str, Any], tell: Tell) -> None:
    folder, sizes = Path(job["folder"]), job["vocab_size"]
    steps, logits, n_steps = (
        nanogpt(sizes, folder, job["max_iters"]) if job["preset"] is None
        else ours(sizes, folder, job["preset"], job["overrides"])
    )  # fmt: skip
    valid = read_ids(folder / "valid.bin")
    seconds = 0.0
    next(steps)
    tell(first_step=True)
    for step in range(2, n_steps + 1):
        start = time.perf_counter()
        next(steps)
        seconds += time.perf_counter() - start
        if step % job["every"] == 0 or step == n_steps:
            loss = validation_loss(logits, valid, SIZES[-2])
            tell(seconds=seconds, step=step, loss=loss)
    tell(end=True)


# --- the run ------------------------------------------------------------------------------


def race(job: dict[str, Any]) -> Curve:
    """Run one side, alone on the machine. Raises Failed."""
    with Child("benchmarks.race", job) as side:
        start_s, points = side.start()["first_s"], []
        while "end" not in (said := side.answer()):
            points.append(Point(**said))
            name = "nanoGPT" if job["preset"] is None else "ours"
            print(f"{name}: {points[-1]}", file=sys.stderr)
    return Curve(start_s, points)


def text_of(file: Path | None) -> str:
    """Return the text, or that of every file of data/raw."""
    if file is not None and not file.is_file():
        raise InputError(f"{file}: no such file")
    files = sorted(Path("data/raw").rglob("*")) if file is None else [file]
    text = "".join(file.read_text() for file in files if file.is_file())
    if len(text) < 20 * SIZES[-2]:
        raise InputError(
            f"{file or 'data/raw'}: {len(text)} characters, expected {20 * SIZES[-2]} or more; "
            "give --text FILE, or make the default corpus: dvc repro corpus"
        )
    return text


def report(theirs: Curve, ours: Curve) -> str:
    """Return Markdown: the loss at equal steps, and at equal times."""
    lines = ["| step | nanoGPT s | nanoGPT loss | ours s | ours loss |", "|--:|--:|--:|--:|--:|"]
    by_step = {point.step: point for point in ours.points}
    for point in theirs.points:
        mine = by_step.get(point.step)
        cells = f" {mine.seconds:.1f} | {mine.loss:.4f} |" if mine else " | |"
        lines.append(f"| {point.step:,} | {point.seconds:.1f} | {point.loss:.4f} |{cells}")
    last = theirs.points[-1]
    total = theirs.start_s + last.seconds
    in_time = [p for p in ours.points if p.seconds <= last.seconds]
    with_start = [p for p in ours.points if p.seconds + ours.start_s <= total]
    below = next((p for p in ours.points if p.loss < last.loss), None)
    starts = f"{theirs.start_s:.1f}, {ours.start_s:.1f}"
    lines += [
        "\n| | training alone | with start and compiling |",
        "|---|--:|--:|",
        f"| nanoGPT's time, s | {last.seconds:.1f} | {total:.1f} |",
        f"| of these start and first step; ours | | {starts} |",
        f"| nanoGPT's last loss | {last.loss:.4f} | {last.loss:.4f} |",
    ]
    found = [
        f"{ps[-1].loss:.4f} (step {ps[-1].step:,})" if ps else "" for ps in (in_time, with_start)
    ]
    lines.append(f"| ours after as long | {found[0]} | {found[1]} |")
    if below is None:
        return "\n".join([*lines, "| ours is never below nanoGPT's last loss | | |"])
    inclusive = (below.seconds + ours.start_s) / total
    share = f"{below.seconds / last.seconds:.0%} | {inclusive:.0%}"
    return "\n".join([*lines, f"| ours is below it (step {below.step:,}) after | {share} |"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--text", type=Path)
    parser.add_argument("--preset", type=Path, default=Path("params.yaml"))
    add_overrides(parser)
    parser.add_argument("--every", type=int, default=50, help="steps between two validations")
    parser.add_argument(
        "--max-iters", type=int, default=2000, help="nanoGPT's steps, its own: 2000"
    )
    options = parser.parse_args()
    with one_line_errors(), sigterm_raises(), tempfile.TemporaryDirectory() as folder:
        text = text_of(options.text)
        characters = sorted(set(text))
        numbers = {character: number for number, character in enumerate(characters)}
        ids = np.array([numbers[character] for character in text], dtype=np.uint16)
        held_out = int(len(ids) * 0.9)
        ids[:held_out].tofile(Path(folder, "train.bin"))
        ids[held_out:].tofile(Path(folder, "valid.bin"))
        uniform = math.log(len(characters))
        print(f"{len(text):,} characters, {len(characters)} distinct (uniform: {uniform:.4f})\n")
        job = {"folder": folder, "vocab_size": len(characters), "every": options.every}
        job |= {"overrides": options.overrides, "max_iters": options.max_iters}
        curves = []
        for preset in (None, str(options.preset.resolve())):
            try:
                curves.append(race(job | {"preset": preset}))
            except Failed as failure:
                print(f"{'ours' if preset else 'nanoGPT'}: {failure}")
        if len(curves) == 2:
            print(report(*curves))


if __name__ == "__main__":
    child() if sys.argv[1:2] and sys.argv[1].startswith("{") else main()
