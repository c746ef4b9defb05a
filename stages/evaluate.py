"""Stage evaluate: how good models/model/ is on the validation split, beside simple baselines.

Where the text is of a grammar (corpus.source), beside its entropy too: the floor for any model.
"""

import math
import time
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lm.base.config import RuntimeConfig
from lm.base.console import say
from lm.base.errors import InputError
from lm.base.files import atomic_write, read_json, sha256_file, write_json
from lm.base.runs import remove_finished, run_folder
from lm.base.settings import CorpusConfig
from lm.base.tables import SHAPES, behind_bigram, ended_worse, require_shape, samples, summary
from lm.data.batches import Split, Tokens, open_tokens, windows
from lm.data.tokenizer import Tokenizer
from lm.evaluate.baselines import Bigram, uniform_loss_nats
from lm.evaluate.excerpt import excerpt, excerpt_json
from lm.evaluate.floor import floor
from lm.generate.decoder import require_same_logits
from lm.generate.stream import complete
from lm.machine.device import choose_device, make_deterministic
from lm.machine.gauges import free_memory_bytes, require_memory
from lm.model.loss import (
    METRICS,
    EvaluateConfig,
    Sums,
    calibration,
    evaluate,
    loss_by_position,
    validation_logits,
)
from lm.model.model_folder import load_model, read_provenance
from lm.model.transformer import TransformerLM
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
TRAIN = RESULTS / "train.json"
CALIBRATION = ("above", "up_to", "tokens", "confidence", "accuracy")
SAMPLE = ("prompt", "temperature", "completion")
TELL_SECONDS = 10  # between two lines about the samples, where they take long


def evaluate_stage(inputs: Inputs) -> None:
    """Write metrics/: eval.json, the tables behind it, samples, an excerpt and summary.md."""
    config = inputs.section(EvaluateConfig, "evaluate")
    inputs.watch(MODEL, TOKENS, TRAIN)
    device = choose_device(inputs.section(RuntimeConfig, "runtime").device)
    model, tokenizer = load_model(MODEL, device)
    provenance = read_provenance(MODEL)
    remove_finished(run_folder(UNFINISHED, provenance))  # by now DVC has recorded what it made
    training = _training()
    make_deterministic(device, provenance["train"].get("num_threads"))
    tokens = open_tokens(TOKENS, sha256_file(MODEL / "tokenizer.json"), tokenizer)
    require_logits_fit(config, model, tokens.valid, device)
    sums = evaluate(
        model, tokens.valid, config.batch_size, tokenizer.byte_lengths, stride=config.stride
    )
    metrics = _metrics(sums)
    if inputs.section(CorpusConfig, "corpus").source == "grammar":
        metrics |= floor(metrics, tokens.valid, tokenizer)
    baselines = _baselines(tokens)
    first, _ = windows(tokens.valid.tokens, np.array([0]), model.config.context_length)
    require_same_logits(model, first[0].tolist(), tokens.valid.end_id)
    texts = _samples(model, tokenizer, config)
    held_out = excerpt(model, tokens.valid, tokenizer)
    remarks = _remarks(metrics, baselines, training, provenance)
    inputs.check()
    write_json(RESULTS / "eval.json", {**metrics, "baseline_loss_nats": baselines})
    _write_csv("loss_by_position.csv", ["position", "loss_nats"], loss_by_position(sums))
    _write_csv("calibration.csv", CALIBRATION, calibration(sums))
    write_json(RESULTS / "samples.json", [dict(zip(SAMPLE, text, strict=True)) for text in texts])
    atomic_write(RESULTS / "samples.md", samples(texts).encode())
    atomic_write(RESULTS / "held_out.json", excerpt_json(held_out))
    (prompt, _, completion), *_ = texts
    text = summary(metrics, baselines, (prompt, completion), PLACES, remarks)
    atomic_write(RESULTS / "summary.md", text.encode())
    say(
        f"Validation loss {metrics['loss_nats']:.4f} nats per token "
        f"(bigram {baselines['bigram']:.4f}), {metrics['bits_per_byte']:.4f} bits per byte"
    )
    for remark in remarks:
        say(f"warning: {remark}")


def _metrics(sums: Sums) -> dict[str, Any]:
    """The metrics by name. Raises InputError for a model whose loss is not finite."""
    metrics = {name: metric(sums) for name, metric in METRICS.items()}
    if not all(map(math.isfinite, metrics.values())):
        raise InputError(
            f"{MODEL}: its loss on the validation split is {metrics['loss_nats']}: the weights are "
            "broken or too large; train it again with a lower train.lr"
        )
    return metrics


def _baselines(tokens: Tokens) -> dict[str, float]:
    """The losses of simple predictors on the validation split, in nats per token."""
    vocab_size = tokens.vocab_size
    unigram, bigram = Bigram(tokens.train.tokens, vocab_size).losses_nats(tokens.valid.tokens)
    return {"uniform": uniform_loss_nats(vocab_size), "unigram": unigram, "bigram": bigram}


def _training() -> dict[str, Any] | None:
    """Return what stage train says of its results, None for a model that comes without."""
    if not TRAIN.is_file():
        return None
    figures = read_json(TRAIN)
    require_shape(figures, SHAPES[TRAIN.name], str(TRAIN))
    return dict(figures)


def _remarks(
    metrics: dict[str, Any],
    baselines: dict[str, float],
    training: dict[str, Any] | None,
    provenance: dict[str, Any],
) -> list[str]:
    """What the model's owner should know, a line each."""
    found = [behind_bigram(metrics, baselines)]
    if training is not None:
        stopping = provenance["train"].get("early_stopping")
        found.append(ended_worse(training, stopping is not None))
    return [remark for remark in found if remark]


def require_logits_fit(
    config: EvaluateConfig, model: TransformerLM, valid: Split, device: torch.device
) -> None:
    """Raise EnvironmentFault before a batch of windows is computed that surely does not fit."""
    stride = config.stride or model.config.context_length
    windows = min(config.batch_size, -(-len(valid.tokens) // stride))
    require_memory(
        f"evaluate.batch_size = {config.batch_size}: the logits of {windows:,} windows take",
        validation_logits(model.config, "float32", windows),
        free_memory_bytes(device),
        "lower it, which changes no result",
    )


def _samples(
    model: TransformerLM, tokenizer: Tokenizer, config: EvaluateConfig
) -> list[tuple[str, float, str]]:
    """Every prompt at every temperature: (prompt, temperature, completion)."""
    options = {name: getattr(config, name) for name in ("top_k", "top_p", "seed")}
    wanted = list(product(config.prompts, config.temperatures))
    found, told = [], time.monotonic()
    for prompt, temperature in wanted:
        pieces = complete(
            model, tokenizer, prompt, config.max_new_tokens, temperature=temperature, **options
        )
        found.append((prompt, temperature, "".join(pieces)))
        if time.monotonic() - told >= TELL_SECONDS:
            told = time.monotonic()
            say(f"{len(found):,} of {len(wanted):,} samples")
    return found


def _write_csv(name: str, columns: Sequence[str], rows: Iterable[Sequence[int | float]]) -> None:
    """Write a table to metrics/; fractions with six decimals."""
    cells = ([f"{v:.6f}" if isinstance(v, float) else str(v) for v in row] for row in rows)
    lines = [",".join(row) + "\n" for row in (columns, *cells)]
    atomic_write(RESULTS / name, "".join(lines).encode())


if __name__ == "__main__":
    run(evaluate_stage, ["corpus", "evaluate", "runtime"])
