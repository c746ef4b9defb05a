"""Stage evaluate: how good models/model/ is on the validation split, beside simple baselines.

Where the text is of a grammar (data.source), beside its entropy too: the floor for any model.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm.baselines import Bigram, uniform_loss_nats
from lm.checkpoint import load_model, read_provenance
from lm.config import RuntimeConfig
from lm.console import say
from lm.device import choose_device, make_deterministic
from lm.errors import InputError
from lm.evaluate import (
    METRICS,
    EvaluateConfig,
    Sums,
    calibration,
    evaluate,
    loss_by_position,
    loss_nats,
)
from lm.excerpt import excerpt, excerpt_json
from lm.files import atomic_write, sha256_file, write_json
from lm.generate import complete
from lm.grammar import STORIES
from lm.model import TransformerLM
from lm.report import samples, summary
from lm.resume import remove_finished, run_folder
from lm.text import DataConfig
from lm.tokenizer import Tokenizer
from lm.tokens import Split, open_tokens
from stages.run import UNFINISHED, Inputs, run

PLACES = {
    "Model": "models/model/         python -m lm.generate --prompt 'def '",
    "Checkpoints": "models/checkpoints/   python -m stages.train --resume-from ...",
    "Metrics": "metrics/*.json        dvc metrics show",
    "Curves": "metrics/curves.csv    dvc plots show",
    "Samples": "metrics/samples.md",
    "Report": "metrics/report.html   open it in a browser",
}
MODEL, TOKENS, RESULTS = Path("models/model"), Path("data/tokens"), Path("metrics")
CALIBRATION = ("above", "up_to", "tokens", "confidence", "accuracy")
SAMPLE = ("prompt", "temperature", "completion")
CHANCE = 0.001  # how far below the floor a model may come: rounding, and no more


def evaluate_stage(inputs: Inputs) -> None:
    """Write metrics/: eval.json, the tables behind it, samples, an excerpt and summary.md."""
    config = inputs.section(EvaluateConfig, "evaluate")
    inputs.watch(MODEL, TOKENS)
    device = choose_device(inputs.section(RuntimeConfig, "runtime").device)
    model, tokenizer = load_model(MODEL, device)
    provenance = read_provenance(MODEL)
    remove_finished(run_folder(UNFINISHED, provenance))  # by now DVC has recorded what it made
    make_deterministic(device, provenance["train"].get("num_threads"))
    tokens = open_tokens(TOKENS, sha256_file(MODEL / "tokenizer.json"), tokenizer)
    sums = evaluate(
        model, tokens.valid, config.batch_size, tokenizer.byte_lengths, stride=config.stride
    )
    metrics = _metrics(sums)
    if inputs.section(DataConfig, "data").source == "grammar":
        metrics |= _floor(metrics, tokens.valid, tokenizer)
    unigram, bigram = Bigram(tokens.train.tokens, tokens.vocab_size).losses_nats(
        tokens.valid.tokens
    )
    baselines = {
        "uniform": uniform_loss_nats(tokens.vocab_size),
        "unigram": unigram,
        "bigram": bigram,
    }
    texts = _samples(model, tokenizer, config)
    held_out = excerpt(model, tokens.valid, tokenizer)
    inputs.check()
    write_json(RESULTS / "eval.json", {**metrics, "baseline_loss_nats": baselines})
    _write_csv("loss_by_position.csv", ["position", "loss_nats"], loss_by_position(sums))
    _write_csv("calibration.csv", CALIBRATION, calibration(sums))
    write_json(RESULTS / "samples.json", [dict(zip(SAMPLE, text, strict=True)) for text in texts])
    atomic_write(RESULTS / "samples.md", samples(texts).encode())
    atomic_write(RESULTS / "held_out.json", excerpt_json(held_out))
    (prompt, _, completion), *_ = texts
    text = summary(metrics, baselines, (prompt, completion), PLACES)
    atomic_write(RESULTS / "summary.md", text.encode())
    say(f"Validation loss {metrics['loss_nats']:.4f} nats per token (bigram {bigram:.4f}), "
        f"{metrics['bits_per_byte']:.4f} bits per byte")  # fmt: skip


def _metrics(sums: Sums) -> dict[str, Any]:
    loss = loss_nats(sums)
    if not math.isfinite(loss):
        raise InputError(
            f"{MODEL}: its validation loss is {loss}: weights too large to compute with; train "
            "again with a lower train.lr"
        )
    return {name: metric(sums) for name, metric in METRICS.items()}


def _samples(
    model: TransformerLM, tokenizer: Tokenizer, config: EvaluateConfig
) -> list[tuple[str, float, str]]:
    """Every prompt at every temperature: (prompt, temperature, completion)."""
    options = {name: getattr(config, name) for name in ("top_k", "top_p", "seed")}
    found = []
    for prompt in config.prompts:
        for temperature in config.temperatures:
            pieces = complete(
                model, tokenizer, prompt, config.max_new_tokens, temperature=temperature, **options
            )
            found.append((prompt, temperature, "".join(pieces)))
    return found


def _write_csv(name: str, columns: Sequence[str], rows: Iterable[Sequence[int | float]]) -> None:
    """Write a table to metrics/; fractions with six decimals."""
    cells = ([f"{v:.6f}" if isinstance(v, float) else str(v) for v in row] for row in rows)
    lines = [",".join(row) + "\n" for row in (columns, *cells)]
    atomic_write(RESULTS / name, "".join(lines).encode())


def _floor(metrics: dict[str, Any], valid: Split, tokenizer: Tokenizer) -> dict[str, float]:
    """What the best model can reach on this very text, and how far above it this one is.

    floor_bits_per_byte = sum of bits(document) / bytes, with the bytes of `bits_per_byte`. Both
    numerators are of the same events. The model's holds every token but the split's first, end
    tokens included; the grammar's holds every choice. A story's last choice tells that it ends (no
    story is a prefix of another), so the end token after it costs the best model nothing; so does
    the first token, for every story begins with the same word. The bytes lack that word's.

    The floor is no estimate: it is -log2 of the true probability of the validation text. A model
    that has not seen the text saves k bits on it with probability below 2^-k (Markov's inequality:
    the expectation of q(x) / p(x) is at most 1), so no luck takes it CHANCE of a split's
    bits below. Raises InputError for one that is, and for text that is not the grammar's.
    """
    bits = 0.0
    for number, text in enumerate(documents(valid, tokenizer), start=1):
        try:
            bits += STORIES.bits(text)
        except ValueError as error:
            raise InputError(
                f"{TOKENS}: document {number} of the validation split is not of the grammar "
                f"({error}); data.source: grammar needs data.path: data/raw and data.split: hash"
            ) from None
    floor, found = bits / metrics["bytes"], metrics["bits_per_byte"]
    if not found >= floor * (1 - CHANCE):
        raise InputError(
            f"{MODEL}: {found:.4f} bits per byte, below the entropy of the text, {floor:.4f}: no "
            "model can; it has seen the validation text in training, or there is a bug"
        )
    return {"floor_bits_per_byte": floor, "distance_to_floor": found / floor - 1}


def documents(split: Split, tokenizer: Tokenizer) -> Iterator[str]:
    """The texts of a split, cut after each end token."""
    ids = split.tokens[: len(split.tokens)]
    for document in np.split(ids, np.flatnonzero(ids == tokenizer.end_id) + 1)[:-1]:
        yield tokenizer.decode(document[:-1].tolist())


if __name__ == "__main__":
    run(evaluate_stage, ["data", "evaluate", "runtime"])
