"""The metrics of a model on a split: numbers and tables from the Sums of lm.model.validation.

A new metric is a function here and its entry in METRICS: stage evaluate writes them all into
metrics/eval.json.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch

from lm.base.errors import InputError
from lm.base.settings import EvaluateConfig, ModelConfig
from lm.data.splits import Split
from lm.machine.gauges import free_memory_bytes, require_memory
from lm.model.activations import ACTIVATIONS
from lm.model.validation import CONFIDENCE_EDGES, Sums, loss_nats


def bits_per_byte(sums: Sums) -> float:
    """Return the cross-entropy in bits per byte of the targets' text: nats / (ln 2 * bytes).

    Independent of the vocabulary, so models with different tokenizers can be compared.
    Raises InputError if there are no bytes.
    """
    if sums.n_bytes == 0:
        raise InputError("the validation split has no text: all its documents are empty; add text")
    return float(sums.nats.sum() / (math.log(2) * sums.n_bytes))


def accuracy(sums: Sums) -> float:
    """Return the share of the targets that were the model's most probable token."""
    n, _, right = sums.first_guesses.sum(axis=1)
    return float(right / n)


def calibration_error(sums: Sums) -> float:
    """Return the expected calibration error of the most probable tokens.

    Guo et al. 2017 ("On Calibration of Modern Neural Networks", eq. 3): the mean over the targets
    of |accuracy - mean confidence| of their bins.
    """
    n, confidence, right = sums.first_guesses
    return float(np.abs(right - confidence).sum() / n.sum())


METRICS: dict[str, Callable[[Sums], float]] = {
    "loss_nats": loss_nats,
    "perplexity": lambda sums: math.exp(min(loss_nats(sums), 690.0)),  # a float holds e^709
    "bits_per_byte": bits_per_byte,
    "accuracy": accuracy,
    "calibration_error": calibration_error,
    "tokens": lambda sums: int(sums.counts.sum()),
    "bytes": lambda sums: sums.n_bytes,
}


def loss_by_position(sums: Sums, max_rows: int = 1000) -> list[tuple[int, float]]:
    """Return rows (position in the window, mean loss in nats), at most `max_rows`.

    If there are more positions, neighbouring ones share a row, which names the first. Rows without
    a target are left out.
    """
    firsts = np.arange(0, len(sums.counts), -(-len(sums.counts) // max_rows))
    counts = np.add.reduceat(sums.counts, firsts)
    nats = np.add.reduceat(sums.nats, firsts)
    return [(int(p), float(s / n)) for p, s, n in zip(firsts, nats, counts, strict=True) if n]


def calibration(sums: Sums) -> list[tuple[float, float, int, float, float]]:
    """Return for each bin with targets: its edges, their number, mean confidence, accuracy."""
    rows = zip(pairwise(CONFIDENCE_EDGES), sums.first_guesses.T, strict=True)
    return [
        (float(low), float(high), int(n), float(confidence / n), float(right / n))
        for (low, high), (n, confidence, right) in rows
        if n
    ]


def require_batch_fits(
    config: EvaluateConfig, model: ModelConfig, valid: Split, device: torch.device
) -> None:
    """Raise EnvironmentFault if a layer's features of a batch of windows cannot fit into memory."""
    stride = config.stride or model.context_length
    windows = min(config.batch_size, -(-len(valid.tokens) // stride))
    # in the feed-forward: the residual stream and its norm, the products and the activation
    widths = 2 * model.d_model + ACTIVATIONS[model.ffn].matrices * model.d_ff
    require_memory(
        f"evaluate.batch_size = {config.batch_size}: the features of {windows:,} windows take",
        4.0 * windows * model.context_length * widths,
        free_memory_bytes(device),
        "lower it, which changes no result",
    )


def finite_metrics(sums: Sums, model: str) -> dict[str, float]:
    """Return every metric by name. Raises InputError, naming the model, if one is not finite."""
    metrics = {name: metric(sums) for name, metric in METRICS.items()}
    if not all(map(math.isfinite, metrics.values())):
        raise InputError(
            f"{model}: its loss on the validation split is {metrics['loss_nats']}: the weights are "
            "broken or too large; train it again with a lower train.lr"
        )
    return metrics
