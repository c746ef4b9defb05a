"""The summary of an evaluation, printed at the end of `make repro`."""

from collections.abc import Iterable, Mapping
from typing import Any

from lm.base.tables import behind_bigram, ended_worse, loss_table
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


def remarks_on(
    metrics: Mapping[str, Any],
    baselines: Mapping[str, float],
    training: Mapping[str, Any] | None,
    stops_early: bool,
) -> list[str]:
    """Return what is wrong with the model; `training` is its metrics/train.json if it has one."""
    found = [
        behind_bigram(metrics, baselines),
        None if training is None else ended_worse(training, stops_early),
    ]
    return [remark for remark in found if remark]
