"""Walk from text to a trained model, with the library's own pieces: `python -m lm.demo`.

Read it beside its output: one function for each step, in the order of `walk`. It runs offline, on
one CPU thread, in half a minute, and writes only into a temporary folder. Stage train does the same
with the same pieces, and can be killed at any point: docs/TOUR.md goes on from here.
"""

import argparse
import math
import tempfile
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lm.base.console import say
from lm.base.errors import one_line_errors
from lm.base.files import sha256_file
from lm.corpus.grammar import STORIES, stories
from lm.data.splits import Split
from lm.evaluate.baselines import Bigram, uniform_loss_nats
from lm.evaluate.metrics import METRICS
from lm.generate.stream import generate
from lm.model.kernels import cross_entropy
from lm.model.transformer import ModelConfig, TransformerLM
from lm.model.validation import evaluate
from lm.plan.footprint import parameters
from lm.runs.checkpoint import load_checkpoint, save_checkpoint
from lm.train.batch import get_batch
from lm.train.optim import AdamW, gradient_clipping
from lm.train.schedule import get_lr_cosine_schedule

SEED = 1337
TEXT_BYTES, HELD_OUT = 400_000, 0.05
STEPS, WARMUP, REPORTS = 300, 30, 6
BATCH, CONTEXT = 8, 128
LR, MIN_LR, MAX_NORM = 6e-3, 6e-4, 1.0
TEMPERATURE, SAMPLE_BYTES = 0.7, 300
MODEL = ModelConfig(
    vocab_size=256,  # bytes
    context_length=CONTEXT,
    d_model=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=None,
    d_ff=256,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    dropout=0.0,
    qk_norm=False,
    tie_embeddings=False,
    norm="rmsnorm",
    norm_position="pre",
    position_embedding="rope",
    ffn="swiglu",
    intra_document_masking=False,
    zero_init=False,
)
Ids = NDArray[np.uint8]


def walk() -> None:
    """Take all steps, one after the other."""
    torch.set_num_threads(1)  # the number of threads decides how sums are cut, and so the last bits
    training, held_out = dataset()
    model = new_model()
    optimizer = new_optimizer(model)
    with tempfile.TemporaryDirectory() as folder:
        train_and_resume(model, optimizer, training, Path(folder))
    metrics(model, training, held_out)
    sample(model)


def dataset() -> tuple[Ids, list[str]]:
    """Return stories as bytes to train on, and stories that are held out."""
    texts = list(stories(SEED, TEXT_BYTES))
    n_held_out = math.ceil(HELD_OUT * len(texts))
    training, held_out = encode(texts[n_held_out:]), texts[:n_held_out]
    x, y = get_batch(training, BATCH, CONTEXT, "cpu", seed=SEED, step=1)
    explain(
        "Dataset (lm/corpus/grammar.py, lm/train/batch.py)",
        f"{len(texts):,} short stories, made here; {n_held_out} of them are held out from the "
        f"start. A token is a byte: {len(training):,} tokens to train on.",
        f"get_batch(dataset, {BATCH}, {CONTEXT}, 'cpu') gives x and y, {tuple(x.shape)} each. y is "
        f"x one token later: where x has {decode(x[0, :16].tolist())!r}, y has "
        f"{decode(y[0, :16].tolist())!r}.",
    )
    return training, held_out


def encode(texts: Sequence[str]) -> Ids:
    """Return the bytes of texts, an empty line after each: token ids from 0 to 255."""
    return np.frombuffer("".join(f"{text}\n\n" for text in texts).encode(), dtype=np.uint8)


def decode(ids: Sequence[int]) -> str:
    """Return the text of token ids; a character that was cut in two becomes a question mark."""
    return bytes(ids).decode(errors="replace")


def new_model() -> TransformerLM:
    """Build a Transformer with random weights."""
    torch.manual_seed(SEED)
    model = TransformerLM(MODEL)
    by_part = ", ".join(f"{part} {count:,}" for part, count in parameters(MODEL).items())
    explain(
        "Model (lm/model/transformer.py)",
        f"A TransformerLM of {MODEL.num_layers} layers, {MODEL.d_model} wide, gives each of the "
        f"{MODEL.vocab_size} tokens a score: how likely it comes next.",
        f"Model has {model.num_parameters():,} parameters: {by_part}.",
    )
    return model


def new_optimizer(model: TransformerLM) -> AdamW:
    """Build the optimizer, and show its schedule."""
    optimizer = AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    rates = [get_lr_cosine_schedule(it, LR, MIN_LR, WARMUP, STEPS) for it in (1, WARMUP, STEPS)]
    explain(
        "Optimizer and schedule (lm/train/optim.py, lm/train/schedule.py)",
        f"AdamW keeps two running means for each parameter: {2 * model.num_parameters():,} numbers "
        "more, which a checkpoint has to hold, too.",
        f"Its learning rate is {rates[0]:.1e} in step 1 and {rates[1]:.1e} in step {WARMUP}. "
        f"Then it falls along a cosine to {rates[2]:.1e} in step {STEPS}.",
    )
    return optimizer


def train(model: TransformerLM, optimizer: AdamW, training: Ids, done: int, until: int) -> None:
    """Take steps `done` + 1 to `until`: the loop."""
    for it in range(done + 1, until + 1):
        for group in optimizer.param_groups:
            group["lr"] = get_lr_cosine_schedule(it, LR, MIN_LR, WARMUP, STEPS)
        x, y = get_batch(training, BATCH, CONTEXT, "cpu", seed=SEED, step=it)
        logits = model(x)  # (B, T, V)
        loss = cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        norm = gradient_clipping(model.parameters(), MAX_NORM)
        optimizer.step()
        if it in (1, until) or it % (STEPS // REPORTS) == 0:
            rate = group["lr"]
            say(f"   step {it:>3}/{STEPS}  loss {loss:.4f}  lr {rate:.2e}  grad norm {norm:.3f}")


def train_and_resume(model: TransformerLM, optimizer: AdamW, training: Ids, folder: Path) -> None:
    """Train to the end with a checkpoint half-way; then resume from it and compare."""
    half, start = STEPS // 2, time.perf_counter()
    explain(
        "Training (lm/train/schedule.py, lm/train/optim.py)",
        "One step: schedule, batch, forward, loss, backward, clip, step. If all bytes were equally "
        f"likely, the loss would be ln {MODEL.vocab_size} = "
        f"{uniform_loss_nats(MODEL.vocab_size):.4f} nats.",
        f"{STEPS} steps of {BATCH} x {CONTEXT} = {BATCH * CONTEXT:,} tokens; gradients with a norm "
        f"above {MAX_NORM:g} are scaled down to it.",
    )
    train(model, optimizer, training, 0, half)
    save_checkpoint(model, optimizer, half, folder / "half.safetensors")
    train(model, optimizer, training, half, STEPS)
    save_checkpoint(model, optimizer, STEPS, folder / "straight.safetensors")
    say(f"   {STEPS} steps in {time.perf_counter() - start:.1f} s")

    size_mb = (folder / "half.safetensors").stat().st_size / 1e6
    explain(
        "Checkpoint and resume (lm/runs/checkpoint.py)",
        f"save_checkpoint wrote weights and running means after step {half}: {size_mb:.1f} MB. "
        "Batch and learning rate are functions of the step, so there is nothing else to save.",
        "load_checkpoint reads them into a new model and a new optimizer. These train to the end:",
    )
    model = TransformerLM(MODEL)
    optimizer = AdamW(model.parameters())
    done = load_checkpoint(folder / "half.safetensors", model, optimizer)
    train(model, optimizer, training, done, STEPS)
    save_checkpoint(model, optimizer, STEPS, folder / "resumed.safetensors")
    straight, resumed = (sha256_file(folder / f"{n}.safetensors") for n in ("straight", "resumed"))
    assert straight == resumed
    say(f"   The same bytes: SHA-256 {straight[:16]}... straight, {resumed[:16]}... resumed.")


def metrics(model: TransformerLM, training: Ids, held_out: list[str]) -> None:
    """Show how well the model predicts held-out text, and how well simpler models do."""
    ids = encode(held_out)
    one_byte_each = np.ones(MODEL.vocab_size, dtype=np.int64)
    sums = evaluate(model, Split("held out", ids, len(ids)), 32, one_byte_each)
    unigram, bigram = Bigram(training, MODEL.vocab_size).losses_nats(ids)
    floor = sum(map(STORIES.bits, held_out)) * math.log(2) / len(ids)
    explain(
        "Metrics (lm/model/validation.py, lm/evaluate/metrics.py)",
        f"On {len(ids):,} held-out bytes, each but the first predicted once: nats per token, "
        "perplexity e^nats, and bits per byte, which compares models with different tokenizers.",
        "The stories come from a grammar that knows the probability of each. The last row is its "
        "loss: only by luck does a model get below it.",
    )
    ours = [METRICS[name](sums) for name in ("loss_nats", "perplexity", "bits_per_byte")]
    rows = {
        "uniform guess": of_bytes(uniform_loss_nats(MODEL.vocab_size)),
        "unigram: byte frequencies": of_bytes(unigram),
        "bigram: pairs of bytes": of_bytes(bigram),
        "this model": ours,
        "entropy: the grammar": of_bytes(floor),
    }
    say(f"   {'':<26}  nats/token  perplexity  bits/byte")
    for name, (nats, perplexity, per_byte) in rows.items():
        say(f"   {name:<26}  {nats:10.4f}  {perplexity:10.2f}  {per_byte:9.4f}")


def of_bytes(nats: float) -> list[float]:
    """Return a loss as nats per token, perplexity and bits per byte, where a token is a byte."""
    return [nats, math.exp(nats), nats / math.log(2)]


def sample(model: TransformerLM) -> None:
    """Show a text that the model writes."""
    prompt = list(b"Once upon a time")
    steps = generate(model, [prompt], SAMPLE_BYTES, temperature=TEMPERATURE, seed=SEED)
    text = decode(prompt + [token.id for (token,) in steps if token is not None])
    explain(
        "Sample (lm/generate/stream.py)",
        f"Each byte is drawn from softmax(logits / {TEMPERATURE}) and read to predict the next. "
        f"{SAMPLE_BYTES} bytes after {decode(prompt)!r}:",
    )
    say("\n".join(f"   | {line}" for line in text.split("\n")))
    say("\nThe same as a pipeline, with a learnt tokenizer: make repro. Go on with docs/TOUR.md.")


def explain(title: str, *paragraphs: str) -> None:
    """Print the title of a step, with its files, and what happens, in the width of a terminal."""
    say(f"\n{title}")
    for text in paragraphs:
        say(textwrap.fill(text, 98, initial_indent="   ", subsequent_indent="   "))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    description = "Walk from text to a trained model in half a minute."
    argparse.ArgumentParser(prog="python -m lm.demo", description=description).parse_args(arguments)
    with one_line_errors():
        walk()


if __name__ == "__main__":
    main()
