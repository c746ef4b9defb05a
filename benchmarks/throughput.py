"""Training speed beside a plain PyTorch loop of the same size, in one run.

    python -m benchmarks.throughput [-S section.key=value ...]

Both train on data/tokens with the settings of params.yaml: the whole step, from the batch to the
updated weights. Slices of a few steps alternate, so that both see the same machine; medians count.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.config import load_params, read_section
from lm.device import choose_device, describe, make_deterministic
from lm.errors import one_line_errors
from lm.model import ModelConfig
from lm.tokens import Split, open_tokens
from lm.train import TrainConfig, new_state, train

SLICES, STEPS_PER_SLICE = 12, 4


class PlainGPT(nn.Module):
    """GPT-2's architecture from torch's stock layers, as an unhurried user would write it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.d_model
        self.tokens = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Embedding(config.context_length, width)
        layer = nn.TransformerEncoderLayer(
            width, config.num_heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(width)
        self.blocks = nn.TransformerEncoder(layer, config.num_layers, norm, False)
        self.head = nn.Linear(width, config.vocab_size, bias=False)
        mask = nn.Transformer.generate_square_subsequent_mask(config.context_length)
        self.register_buffer("mask", mask)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.blocks(x, mask=self.mask, is_causal=True))


def plain_steps(config: ModelConfig, settings: TrainConfig, split: Split) -> Iterator[None]:
    """nanoGPT's loop: memmap batch, forward, loss, backward, clip, torch's AdamW."""
    model = PlainGPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95))
    length = config.context_length
    while True:
        starts = torch.randint(len(split.tokens) - length, (settings.batch_size,)).tolist()
        x, y = (
            torch.stack(
                [
                    torch.from_numpy(split.tokens[s + i : s + i + length].astype(np.int64))
                    for s in starts
                ]
            )
            for i in (0, 1)
        )
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        yield


def interleaved(contestants: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds per step of each, measured in alternating slices after a warm-up."""
    for step in contestants.values():
        for _ in range(3):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(SLICES):
        for name, step in contestants.items():
            for _ in range(STEPS_PER_SLICE):
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-S", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    with one_line_errors():
        params = load_params(Path("params.yaml"), options.overrides)
        tokens = open_tokens(Path("data/tokens"))
        config = read_section(ModelConfig, params, "model", vocab_size=tokens.vocab_size)
        settings = replace(read_section(TrainConfig, params, "train"), max_steps=10**9)
        device = choose_device("cpu")
        make_deterministic(device, settings.num_threads)

        def ours(**changes: object) -> Callable[[], object]:
            changed = replace(settings, **changes)  # type: ignore[arg-type]
            steps = train(new_state(config, changed, device), tokens.train, changed)
            return lambda: next(steps)

        plain = plain_steps(config, settings, tokens.train)
        medians = interleaved(
            {
                "plain PyTorch loop, float32": lambda: next(plain),
                f"default ({settings.optimizer}, {settings.dtype})": ours(),
                "default with AdamW": ours(optimizer="adamw"),
                "AdamW, bfloat16, compiled": ours(
                    optimizer="adamw", dtype="bfloat16", compile=True
                ),
            }
        )
    n_tokens = settings.batch_size * config.context_length
    parameters = sum(p.numel() for p in PlainGPT(config).parameters())
    print(f"{describe(device)}, torch {torch.__version__}; plain model {parameters:,} parameters\n")
    print("| training step | ms | tokens/s | ratio |\n|---|---:|---:|---:|")
    baseline = next(iter(medians.values()))
    for name, seconds in medians.items():
        speed = f"{seconds * 1e3:.1f} | {n_tokens / seconds:,.0f} | {baseline / seconds:.2f}"
        print(f"| {name} | {speed} |")


if __name__ == "__main__":
    main()
