"""Time how long training waits for a checkpoint, at GPT-2's size (124M parameters, AdamW).

    python -m benchmarks.checkpoint [FOLDER]

Beside it: a copy of the same bytes in memory, which no save can beat; and a save that waits for the
disk. Training steps are timed with and without a write in the background.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from lm.machine.device import describe
from lm.model.kernels import cross_entropy
from lm.model.transformer import ModelConfig, TransformerLM
from lm.runs.checkpoint import contents, save_checkpoint
from lm.runs.manifest import commit
from lm.runs.run_folder import RunFolder
from lm.train.optim import AdamW

SHAPE = ModelConfig(
    vocab_size=50304, context_length=64, d_model=768, num_layers=12, num_heads=12,
    num_kv_heads=None, d_ff=2048, rope_theta=10000.0, norm_eps=1e-5, dropout=0.0, qk_norm=False,
    tie_embeddings=True, norm="rmsnorm", norm_position="pre", position_embedding="rope",
    ffn="swiglu", intra_document_masking=False,
    zero_init=False,
)  # fmt: skip
REPEATS = 5


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    torch.manual_seed(0)
    model = TransformerLM(SHAPE)
    optimizer = AdamW(model.parameters())

    def step() -> None:
        ids = torch.randint(SHAPE.vocab_size, (1, SHAPE.context_length + 1))
        optimizer.zero_grad()
        cross_entropy(model(ids[:, :-1]), ids[:, 1:]).backward()
        optimizer.step()

    step()
    tensors, _ = contents(model, optimizer, 0)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    parent = sys.argv[1] if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory(dir=parent) as scratch:
        folder = Path(scratch)
        run_folder = RunFolder(folder / "run", keep=2)
        extra = {"best": {"step": None}}

        def copy() -> None:
            for name, tensor in tensors.items():
                copies[name].copy_(tensor)

        def wait_for_the_disk() -> None:
            save_checkpoint(model, optimizer, 0, folder / "a.safetensors", extra)
            commit(folder / "a.safetensors")

        first = seconds(lambda: run_folder.save(model, optimizer, 0, extra))
        run_folder.wait()
        times: dict[str, list[float]] = {}
        for number in range(1, REPEATS + 1):

            def add(name: str, action: Callable[[], object]) -> None:
                times.setdefault(name, []).append(seconds(action))

            add("copy in memory", copy)
            add("save that waits for the disk", wait_for_the_disk)
            add("training step, alone", step)
            start = time.perf_counter()
            add("save in the background: the step waits", partial(
                run_folder.save, model, optimizer, number, extra))  # fmt: skip
            add("training step, a save behind it", step)
            run_folder.wait()
            times.setdefault("save in the background: until it is on disk", []).append(
                time.perf_counter() - start
            )
        run_folder.unlock()
    parameters = model.num_parameters()
    print(f"{parameters:,} parameters, {size / 1e9:.2f} GB; {describe(torch.device('cpu'))}\n")
    print("| | seconds (median of 5) |\n|---|---:|")
    for name, values in times.items():
        print(f"| {name} | {statistics.median(values):.2f} |")
    print(f"| the first save, which makes the buffers | {first:.2f} |")


if __name__ == "__main__":
    main()
