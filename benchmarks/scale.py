"""Print the tables of docs/SCALE.md: memory, traffic and time of several GPUs, by the plan.

    python -m benchmarks.scale

It runs no training: it applies the formulas of lm.plan.footprint to the models, batches and GPUs
below. "even at" is the bandwidth at which sending takes as long as computing; below it, sending
decides the speed.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lm.base.params import load_params
from lm.base.sections import read_section
from lm.base.settings import TrainConfig, share_of_batch
from lm.model.transformer import ModelConfig, TransformerLM
from lm.plan.footprint import communication, flops_per_token, parameters, peak_memory
from lm.plan.plan import MARGIN, largest_micro_batch

PRESET = Path(__file__).parent.parent / "presets" / "gpt2-124m.yaml"
CUDA = torch.device("cuda")
FREE_BYTES = 81_559 * 2**20  # of an H100 of 80 GB, by nvidia-smi
PEAKS = {"H100": 989e12, "A100": 312e12}  # FLOP/s in bfloat16, dense, by the data sheets
REACHED = 0.4  # of the peak, by the products that are computed
PER_HOST = 8
# bytes per second that a GPU can send in a ring: NVLink; over hosts, where each of eight rings
# leaves a host by an adapter of its own, of 400 Gbit/s
NODE, NETWORK = 450e9, PER_HOST * 50e9
GPUS = (8, 64, 512)
PARTS = ("weights", "optimizer state", "gradients", "gathered weights")
HEADER = (
    "| way, GPUs | micro-batch size | checkpointing | weights | state | gradients | gathered "
    "| rest | GB in all | micro-batches | GB sent | s computing | s sending | even at GB/s |"
)


class Run(NamedTuple):
    """A published training, and the tokens per second of each of its GPUs."""

    source: str
    model: str
    gpu: str
    tokens_per_second: float


def models() -> dict[str, tuple[ModelConfig, TrainConfig]]:
    """Return shape and settings by name; the batch is one that was used for such a size."""
    params = load_params(PRESET, ["train.compile=true"])
    gpt2 = read_section(ModelConfig, params, "model", vocab_size=50257)
    train = read_section(TrainConfig, params, "train")

    def llama(batch_size: int, **sizes: Any) -> tuple[ModelConfig, TrainConfig]:
        shape = dataclasses.replace(gpt2, tie_embeddings=False, **sizes)
        return shape, dataclasses.replace(train, batch_size=batch_size)

    return {
        "124M": (gpt2, train),
        # GPT-3 XL's depth, width and batch (Brown et al. 2020, table 2.1) with three matrices
        "1.3B": llama(512, vocab_size=32_000, context_length=2048, d_model=2048, num_layers=24,
                      num_heads=16, d_ff=5504),
        # Llama 2 7B (Touvron et al. 2023), its batch of 4 million tokens
        "7B": llama(1024, vocab_size=32_000, context_length=4096, d_model=4096, num_layers=32,
                    num_heads=32, d_ff=11008),
        # Llama 3.1 8B (Grattafiori et al. 2024), in torchtitan's measurements
        "8B": llama(16, vocab_size=128_256, context_length=8192, d_model=4096, num_layers=32,
                    num_heads=32, num_kv_heads=8, d_ff=14336),
    }  # fmt: skip


PUBLISHED = (
    Run("llm.c #481, 8 GPUs: 10e9 tokens in 90 minutes", "124M", "A100", 10e9 / 5400 / 8),
    Run("Schwartz, 8 GPUs: 3 million tokens/s", "124M", "H100", 3e6 / 8),
    Run("Llama 2: 2e12 tokens in 184,320 GPU hours", "7B", "A100", 2e12 / 184_320 / 3600),
    Run("fms-fsdp, 128 GPUs", "7B", "A100", 3760),
    Run("torchtitan, FSDP2, compiled, 8 GPUs", "8B", "H100", 6667),
    Run("torchtitan, FSDP2, compiled, 128 GPUs", "8B", "H100", 6514),
)
# Llama 3.1 8B by torchtitan's FSDP2, compiled, "selective" checkpointing: what torch had reserved
TORCHTITAN_GIB = {8: 77.0, 128: 62.0}


class Step(NamedTuple):
    """One update of one of several GPUs, with the largest micro-batches that fit."""

    config: TrainConfig
    windows: int
    micro_batches: int
    memory: dict[str, float]
    sent: float  # bytes
    computing_s: float
    sending_s: float

    @property
    def seconds(self) -> float:
        """Return the longer of both times: the shorter one runs beside it."""
        return max(self.computing_s, self.sending_s)


def step(model: ModelConfig, config: TrainConfig, num_processes: int) -> Step:
    """Plan an update at REACHED of an H100's peak; NVLink within a host, else the network."""
    windows = largest_micro_batch(model, config, CUDA, FREE_BYTES, num_processes)
    share = share_of_batch(config, num_processes)
    flops = sum(map(sum, flops_per_token(model, config, CUDA).values()))
    sent = sum(communication(model, config, num_processes, share // windows).values())
    return Step(
        config,
        windows,
        share // windows,
        peak_memory(model, config, CUDA, windows, 0, num_processes),
        sent,
        share * model.context_length * flops / (REACHED * PEAKS["H100"]),
        sent / (NODE if num_processes <= PER_HOST else NETWORK),
    )


def row(model: ModelConfig, config: TrainConfig, num_processes: int) -> str:
    """Return a line of the first tables; checkpoint gradients if only that fits or is faster."""
    ways = [
        step(model, dataclasses.replace(config, gradient_checkpointing=again), num_processes)
        for again in (False, True)
    ]
    fit = [way for way in ways if sum(way.memory.values()) <= MARGIN * FREE_BYTES]
    best = min(fit, key=lambda way: way.seconds) if fit else ways[-1]
    parts = [best.memory.get(part, 0.0) for part in PARTS]
    parts += [sum(best.memory.values()) - sum(parts), sum(best.memory.values())]
    sizes = " | ".join(f"{size / 1e9:.1f}" for size in parts)
    again = "yes" if best.config.gradient_checkpointing else "no"
    start = f"| {config.parallel}, {num_processes} | {best.windows} | {again} | {sizes}"
    if not fit:
        return f"{start}: does not fit | | | | | |"
    return (
        f"{start} | {best.micro_batches} | {best.sent / 1e9:,.1f} | {best.computing_s:.3f} | "
        f"{best.sending_s:.3f} | {best.sent / best.computing_s / 1e9:.0f} |"
    )


def main() -> None:
    shapes = models()
    for name in ("124M", "1.3B", "7B"):
        model, config = shapes[name]
        count = sum(parameters(model).values())
        tokens = config.tokens_per_step(model)
        print(f"\n{name}: {count:,} parameters, {tokens:,} tokens an update\n")
        print(HEADER)
        print("|---|--:|---" + "|--:" * 11 + "|")
        for parallel in ("ddp", "fsdp"):
            for number in GPUS:
                print(row(model, dataclasses.replace(config, parallel=parallel), number))
    print("\n| published | model | tokens/s of a GPU | of its peak |\n|---|---|--:|--:|")
    for run in PUBLISHED:
        with torch.device("meta"):
            flops = TransformerLM(shapes[run.model][0]).flops_per_token()
        share = run.tokens_per_second * flops / PEAKS[run.gpu]
        cells = f"{run.model}, {run.gpu} | {run.tokens_per_second:,.0f} | {share:.0%}"
        print(f"| {run.source} | {cells} |")
    model, config = shapes["8B"]
    print("\n| 8B, GPUs | all kept: GiB | checkpointing | torchtitan, part of it | GB sent |")
    print("|---|--:|--:|--:|--:|")
    for number, measured in TORCHTITAN_GIB.items():
        config = dataclasses.replace(config, parallel="fsdp", batch_size=2 * number)
        planned = [
            peak_memory(model, dataclasses.replace(config, gradient_checkpointing=again),
                        CUDA, 2, 0, number)
            for again in (False, True)
        ]  # fmt: skip
        gib = " | ".join(f"{sum(memory.values()) / 2**30:.1f}" for memory in planned)
        sent = sum(communication(model, config, number, 1).values())
        print(f"| {number} | {gib} | {measured} | {sent / 1e9:.1f} |")


if __name__ == "__main__":
    main()
