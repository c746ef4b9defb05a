"""Time a batch beside one made in nanoGPT's way, and give its share of a training step.

    python -m benchmarks.batches

Batches are 32 windows of 1,024 tokens from a training split of 100 MB in the page cache; then those
of presets/smoke.yaml from the same tokens, beside its steps. Calls alternate; medians count.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from lm.base.params import load_params
from lm.base.sections import read_section
from lm.base.settings import TrainConfig, WindowOrder
from lm.data.shards import ShardWriter, token_dtype, write_manifest
from lm.data.splits import Split, open_tokens
from lm.model.transformer import ModelConfig
from lm.train.loop import train
from lm.train.state import new_state

BATCH_SIZE, CONTEXT_LENGTH = 32, 1024
N_TOKENS, VOCAB_SIZE, END_ID = 50_000_000, 50_257, 50_256
ROUNDS = 400
BASELINE = "nanoGPT's get_batch"


def write(folder: Path, n_shards: int, weights: list[float | None]) -> Split:
    """Write random tokens, with the end of a document every 500 or so, in equal shards."""
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, N_TOKENS, dtype=np.uint16)
    ids[np.random.default_rng(1).integers(0, N_TOKENS, N_TOKENS // 500)] = END_ID
    shards = []
    for number, part in enumerate(np.array_split(ids, n_shards)):
        shard: dict[str, object] = {"source": f"source{number * len(weights) // n_shards}"}
        for split, piece in (("train", part), ("valid", part[:1])):
            path = folder / split / f"text-{number:05}.bin"
            with ShardWriter(path, token_dtype(VOCAB_SIZE)) as writer:
                writer.append(piece, piece.nbytes, 1)
            shard[split] = writer.entry()
        shards.append(shard)
    write_manifest(
        folder,
        vocab_size=VOCAB_SIZE,
        end_id=END_ID,
        tokenizer_sha256="",
        sources=[{"name": f"source{i}", "weight": weight} for i, weight in enumerate(weights)],
        shards=shards,
    )
    return open_tokens(folder).train


def as_nanogpt(file: Path) -> None:
    """Make a batch plainly: map the file anew, cut 2 x 32 slices, stack them as int64."""
    data = np.memmap(file, dtype=np.uint16, mode="r")
    starts = torch.randint(len(data) - CONTEXT_LENGTH, (BATCH_SIZE,)).tolist()
    for shift in (0, 1):
        slices = (data[s + shift : s + shift + CONTEXT_LENGTH] for s in starts)
        torch.stack([torch.from_numpy(piece.astype(np.int64)) for piece in slices])


def batches(
    split: Split, sampling: WindowOrder, size: int = BATCH_SIZE, length: int = CONTEXT_LENGTH
) -> Callable[[], object]:
    """Return a call that makes the next batch, as tensors."""
    steps = count()

    def following() -> object:
        x, y = split.batch(next(steps), size, length, 1337, sampling)
        return torch.from_numpy(x), torch.from_numpy(y)

    return following


def interleaved(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each; call them in turns, in another order each time."""
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name, call in order.sample(list(contestants.items()), len(contestants)):
            start = time.perf_counter()
            call()
            if number >= rounds // 10:  # the rest is warming up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) * 1e3 for name, values in seconds.items()}


def smoke_step() -> tuple[dict[str, Callable[[], object]], tuple[int, int]]:
    """Return a call that trains one step of the preset, on one thread; and its batches' shape."""
    torch.set_num_threads(1)
    params = load_params(Path("presets/smoke.yaml"), ["train.compile=false"])
    config = replace(read_section(TrainConfig, params, "train"), max_steps=10**9)
    vocab_size = params["tokenizer"]["vocab_size"]
    model = read_section(ModelConfig, params, "model", vocab_size=vocab_size)
    split = Split("train", np.random.default_rng(0).integers(0, vocab_size, 100_000), 0)
    steps = train(new_state(model, config, torch.device("cpu")), split, config)
    return {"step": lambda: next(steps)}, (config.batch_size, model.context_length)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        one = write(Path(scratch, "one"), 1, [None])
        many = write(Path(scratch, "many"), 100, [0.7, 0.2, 0.1])
        plain = Path(scratch, "one", "train", "text-00000.bin")
        contestants: dict[str, Callable[[], object]] = {BASELINE: lambda: as_nanogpt(plain)}
        for sampling in get_args(WindowOrder):
            contestants[f"{sampling}, one shard"] = batches(one, sampling)
            contestants[f"{sampling}, 3 weighted sources of 100 shards"] = batches(many, sampling)
        medians = interleaved(contestants, ROUNDS)
        print(
            f"| a batch of {BATCH_SIZE} x {CONTEXT_LENGTH} | ms | times faster |\n|---|---:|---:|"
        )
        for name, ms in medians.items():
            print(f"| {name} | {ms:.3f} | {medians[BASELINE] / ms:.1f} |")
        contestants, shape = smoke_step()
        for sampling in get_args(WindowOrder):
            contestants[sampling] = batches(one, sampling, *shape)
        medians = interleaved(contestants, ROUNDS)
        print("\n| presets/smoke.yaml | ms | share of the step |\n|---|---:|---:|")
        for name, ms in medians.items():
            print(f"| {name} | {ms:.3f} | {ms / medians['step']:.2%} |")


if __name__ == "__main__":
    main()
