"""Results as text for people."""

import math
from collections.abc import Mapping
from typing import Any

ROWS = {
    "uniform": "uniform guess",
    "unigram": "unigram",
    "bigram": "bigram, interpolated",
    "loss_nats": "this model",
}


def summary(
    metrics: Mapping[str, Any],
    baselines: Mapping[str, float],
    sample: tuple[str, str],
    places: Mapping[str, str],
) -> str:
    """The validation loss beside its baselines, a sample, and where everything lies (Markdown)."""
    losses = {**baselines, "loss_nats": metrics["loss_nats"]}
    bits = metrics["tokens"] / (math.log(2) * metrics["bytes"])  # nats/token to bits/byte
    lines = [
        f"Validation on {metrics['tokens']:,} tokens ({metrics['bytes']:,} bytes)",
        "",
        "|                      | nats per token | perplexity | bits per byte |",
        "|----------------------|---------------:|-----------:|--------------:|",
        *(
            f"| {label:<20} | {losses[key]:>14.4f} | {math.exp(min(losses[key], 99.0)):>10,.1f} "
            f"| {losses[key] * bits:>13.4f} |"
            for key, label in ROWS.items()
        ),
        "",
        samples([sample]),
        *(f"{what:<12} {where}" for what, where in places.items()),
    ]
    return "\n".join(lines) + "\n"


def samples(pairs: list[tuple[str, str]]) -> str:
    """Prompts and their completions (Markdown)."""
    return "".join(
        f"Prompt `{prompt}`:\n\n" + _indented(prompt + completion) + "\n\n"
        for prompt, completion in pairs
    )


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.rstrip().split("\n"))
