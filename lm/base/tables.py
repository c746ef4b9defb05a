"""Results as text for people: Markdown tables and remarks."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

WORSE = 0.01  # relative to the best validation loss: a smaller difference is noise
DIVERGED = "diverged_at_step"  # a key of metrics/train.json if the run diverged
ROWS = {
    "uniform": "uniform guess",
    "unigram": "unigram",
    "bigram": "bigram, interpolated",
    "loss_nats": "this model",
    "floor": "entropy of the grammar",
}


class Predictor(NamedTuple):
    """A row of the table of losses."""

    key: str  # as in eval.json; "floor" for the entropy of the grammar
    name: str
    loss_nats: float
    perplexity: float
    bits_per_byte: float


def predictors(metrics: Mapping[str, Any], baselines: Mapping[str, float]) -> list[Predictor]:
    """Return the losses of the baselines, of the model, and the floor if there is one."""
    bits = metrics["tokens"] / (math.log(2) * metrics["bytes"])  # nats/token to bits/byte
    losses = {**baselines, "loss_nats": metrics["loss_nats"]}
    if "floor_bits_per_byte" in metrics:
        losses["floor"] = metrics["floor_bits_per_byte"] / bits
    return [
        Predictor(key, ROWS.get(key, key), loss, math.exp(min(loss, 99.0)), loss * bits)
        for key, loss in losses.items()
    ]


def loss_table(metrics: Mapping[str, Any], baselines: Mapping[str, float]) -> str:
    """Return the validation loss beside its baselines as Markdown."""
    rows = predictors(metrics, baselines)
    width = max(len(row.name) for row in rows)
    lines = [
        f"Validation on {metrics['tokens']:,} tokens ({metrics['bytes']:,} bytes)",
        "",
        f"| {'':<{width}} | nats per token | perplexity | bits per byte |",
        f"|-{'-' * width}-|---------------:|-----------:|--------------:|",
    ]
    lines += [
        f"| {name:<{width}} | {nats:>14.4f} | {perplexity:>10,.1f} | {bits:>13.4f} |"
        for _, name, nats, perplexity, bits in rows
    ]
    return "\n".join(lines) + "\n"


def plain(text: str) -> str:
    """Escape the control characters in a text; a model may generate any.

    A terminal would obey them, and Markdown ends a line at a carriage return.
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: ascii(found[0])[1:-1], text)


def data_table(report: Mapping[str, Any]) -> str:
    """Return the figures of metrics/data.json, by source and in all, as Markdown."""
    rows = [*report["sources"].items(), *([("all", report)] if len(report["sources"]) > 1 else [])]
    lines = [
        "| source | documents | bytes | tokens | held out | bytes per token | longest document "
        "| vocabulary used |",
        "|--------|----------:|------:|-------:|---------:|----------------:|-----------------:"
        "|----------------:|",
    ]
    lines += [
        f"| {name} | {part['documents']:,} | {part['bytes']:,} | {part['tokens']:,} "
        f"| {part['valid']['tokens'] / max(1, part['tokens']):.1%} "
        f"| {part['bytes_per_token']:.2f} | {part['longest_document_bytes']:,} "
        f"| {part['vocabulary_used'] / report['vocabulary']:.1%} |"
        for name, part in rows
    ]
    left_out = {"duplicate": report["duplicates"], **report["left_out"]}
    counted = [f"{count:,} {reason}" for reason, count in left_out.items() if count]
    if counted:
        lines += ["", f"Left out: {', '.join(counted)}"]
    if report["replacement_characters"]:
        lines += ["", f"Replacement characters put in: {report['replacement_characters']:,}"]
    unseen = [name for name, part in report["sources"].items() if not part["valid"]["tokens"]]
    if unseen:
        lines += [
            "",
            f"No held-out text in {', '.join(unseen)}: validation says nothing of it; raise "
            "data.valid_fraction or add text",
        ]
    return "\n".join(lines) + "\n"


def remarks_on(
    metrics: Mapping[str, Any],
    baselines: Mapping[str, float],
    training: Mapping[str, Any] | None,
    stops_early: bool,
) -> list[str]:
    """Return warnings about the model; `training` is its metrics/train.json if it has one."""
    found = []
    loss, bigram = metrics["loss_nats"], baselines["bigram"]
    if loss > bigram:
        found.append(
            f"the model ({loss:.4f}) is worse than the bigram baseline ({bigram:.4f}): train it "
            "longer, or with another train.lr"
        )
    worse = None if training is None else ended_worse(training, stops_early)
    return [*found, worse] if worse else found


def ended_worse(train: Mapping[str, Any], publishes_best: bool) -> str | None:
    """Return a remark if a training, by its metrics/train.json, ended worse than its best.

    With early stopping the best model is published, so no remark is needed.
    """
    best, last = train["best_valid_loss"], train["valid_loss"]
    if publishes_best or last <= (1 + WORSE) * best:
        return None
    return (
        f"best validation was step {train['best_step']:,} ({best:.4f}), published step "
        f"{train['step']:,} ({last:.4f}): set train.early_stopping"
    )
