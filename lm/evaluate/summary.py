"""The summary of an evaluation, printed at the end of `make repro`."""

from collections.abc import Iterable, Mapping
from typing import Any

from lm.base.tables import loss_table
from lm.evaluate.samples import Sample, as_block


def summary(
    metrics: Mapping[str, Any],
    baselines: Mapping[str, float],
    sample: Sample,
    places: Mapping[str, str],
    remarks: Iterable[str],
) -> str:
    """Return the losses, a sample and where every result lies, as Markdown."""
    lines = [
        loss_table(metrics, baselines),
        *(f"Warning: {remark}\n" for remark in remarks),
        as_block(f"Prompt `{sample.prompt}`", sample.prompt + sample.completion),
        *(f"{what:<12} {where}" for what, where in places.items()),
    ]
    return "\n".join(lines) + "\n"
