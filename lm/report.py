"""Results as text for people."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

ROWS = {
    "uniform": "uniform guess",
    "unigram": "unigram",
    "bigram": "bigram, interpolated",
    "loss_nats": "this model",
    "floor": "entropy of the grammar",
}


def summary(
    metrics: Mapping[str, Any],
    baselines: Mapping[str, float],
    sample: tuple[str, str],
    places: Mapping[str, str],
    remarks: Iterable[str] = (),
) -> str:
    """The validation loss beside its baselines, a sample, and where everything lies (Markdown)."""
    prompt, completion = sample
    lines = [
        loss_table(metrics, baselines),
        *(f"Warning: {remark}\n" for remark in remarks),
        _sample(f"Prompt `{prompt}`", prompt + completion),
        *(f"{what:<12} {where}" for what, where in places.items()),
    ]
    return "\n".join(lines) + "\n"


def behind_bigram(metrics: Mapping[str, Any], baselines: Mapping[str, float]) -> str | None:
    """That counting pairs of tokens predicts better than the model, in words; None if not."""
    loss, bigram = metrics["loss_nats"], baselines["bigram"]
    if loss <= bigram:
        return None
    return (
        f"the model ({loss:.4f}) is worse than the bigram baseline ({bigram:.4f}): train it "
        "longer, or with another train.lr"
    )


def loss_table(metrics: Mapping[str, Any], baselines: Mapping[str, float]) -> str:
    """The validation loss beside its baselines (Markdown)."""
    bits = metrics["tokens"] / (math.log(2) * metrics["bytes"])  # nats/token to bits/byte
    losses = {**baselines, "loss_nats": metrics["loss_nats"]}
    if "floor_bits_per_byte" in metrics:
        losses["floor"] = metrics["floor_bits_per_byte"] / bits
    rows = {key: ROWS[key] for key in losses}
    width = max(map(len, rows.values()))
    lines = [
        f"Validation on {metrics['tokens']:,} tokens ({metrics['bytes']:,} bytes)",
        "",
        f"| {'':<{width}} | nats per token | perplexity | bits per byte |",
        f"|-{'-' * width}-|---------------:|-----------:|--------------:|",
        *(
            f"| {rows[key]:<{width}} | {loss:>14.4f} | {math.exp(min(loss, 99.0)):>10,.1f} "
            f"| {loss * bits:>13.4f} |"
            for key, loss in losses.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def samples(texts: Iterable[tuple[str, float, str]]) -> str:
    """Prompts, temperatures and completions (Markdown)."""
    return "".join(
        _sample(f"Prompt `{prompt}`, temperature {temperature:g}", prompt + completion)
        for prompt, temperature, completion in texts
    )


def _sample(head: str, text: str) -> str:
    return f"{head}:\n\n{_indented(text)}\n\n"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in plain(text).rstrip().split("\n"))


def plain(text: str) -> str:
    """A text whose control characters are written out: of a model, they may be any.

    A terminal would obey them, and Markdown ends a line at a carriage return.
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: ascii(found[0])[1:-1], text)


def data_table(report: Mapping[str, Any]) -> str:
    """What the tokens hold, by source and in all, and what was left out (Markdown)."""
    rows = [*report["sources"].items(), *([("all", report)] if len(report["sources"]) > 1 else [])]
    lines = [
        "| source | documents | bytes | tokens | held out | bytes per token | longest document "
        "| vocabulary used |",
        "|--------|----------:|------:|-------:|---------:|----------------:|-----------------:"
        "|----------------:|",
        *(
            f"| {name} | {part['documents']:,} | {part['bytes']:,} | {part['tokens']:,} "
            f"| {part['valid']['tokens'] / max(1, part['tokens']):.1%} "
            f"| {part['bytes_per_token']:.2f} | {part['longest_document_bytes']:,} "
            f"| {part['vocabulary_used'] / report['vocabulary']:.1%} |"
            for name, part in rows
        ),
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
