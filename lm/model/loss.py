"""Measure how well a model predicts a split.

windows -evaluate-> Sums -> METRICS, loss_by_position, calibration
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lm.base.errors import InputError
from lm.base.settings import Dtype as Dtype
from lm.base.settings import EvaluateConfig as EvaluateConfig
from lm.base.settings import ModelConfig
from lm.data.batches import Split, windows
from lm.machine.device import autocast, to_device
from lm.machine.processes import ALONE, Processes
from lm.model.transformer import TransformerLM

CONFIDENCE_EDGES = np.linspace(0, 1, 16)  # 15 equal bins, as Guo et al. 2017


@dataclass(frozen=True)
class Sums:
    """What a pass over a split adds up."""

    nats: NDArray[np.float64]  # (T,), by position in the window
    counts: NDArray[np.int64]  # (T,)
    n_bytes: int  # of text behind the targets; 0 if not asked for
    # (3, 15), the most probable tokens in bins of their probability: number, its sum, number right
    first_guesses: NDArray[np.float64]

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.nats + other.nats,
            self.counts + other.counts,
            self.n_bytes + other.n_bytes,
            self.first_guesses + other.first_guesses,
        )


@torch.no_grad()
def evaluate(
    model: TransformerLM,
    split: Split,
    batch_size: int,
    byte_lengths: NDArray[np.int64] | None = None,
    *,
    stride: int | None = None,
    max_batches: int | None = None,
    dtype: Dtype = "float32",
    processes: Processes = ALONE,
) -> Sums:
    """Sum the loss of every token but the first; each is a target exactly once.

    Windows start every `stride` tokens and only their new targets count, so a smaller stride
    gives each target more context. The last window is moved back to fit. `max_batches` limits the
    batches of windows; those taken are spread evenly over the split. `byte_lengths` (V,) holds the
    number of bytes of each id. Several processes take the batches in turn; each returns the sums of
    all, added in the same order whatever the number of processes.
    """
    length = model.config.context_length
    split.require(length)
    was_training = model.training
    model.eval()
    total = Sums(
        np.zeros(length), np.zeros(length, dtype=np.int64), 0,
        np.zeros((3, len(CONFIDENCE_EDGES) - 1)),
    )  # fmt: skip
    table = _windows(len(split.tokens), length, stride or length)
    if max_batches is not None and len(table) > (limit := max_batches * batch_size):
        table = table[np.arange(limit) * len(table) // limit]
    batches = np.split(table, range(batch_size, len(table), batch_size))
    for first in range(0, len(batches), processes.size):
        mine = min(first + processes.rank, len(batches) - 1)  # all must join in gathering
        sums = _sums_of(model, split, batches[mine], byte_lengths, dtype)
        for part in processes.gather(sums)[: len(batches) - first]:
            total = total + part
    model.train(was_training)
    return total


def _sums_of(
    model: TransformerLM,
    split: Split,
    rows: NDArray[np.int64],
    byte_lengths: NDArray[np.int64] | None,
    dtype: Dtype,
) -> Sums:
    """Return the sums of a batch of windows, given as rows of `_windows`."""
    starts, first_new = rows[:, 0], rows[:, 1]
    length, device = model.config.context_length, model.head.device
    x, y = windows(split.tokens, starts, length)  # (B, T)
    ids = to_device(x, device)
    documents = model.documents(ids, split.end_id)
    with autocast(device, dtype):
        logits = model(ids, documents=documents)
    flat, targets = logits.float().flatten(0, 1), to_device(y, device).flatten()
    losses = F.cross_entropy(flat, targets, reduction="none")
    top, guesses = flat.max(dim=1)
    # p = e^(top - logsumexp), and the loss is logsumexp - the target's logit
    confidence = (top - flat.gather(1, targets[:, None]).squeeze(1) - losses).exp()
    new = np.arange(length) >= first_new[:, None]  # (B, T)
    right = (guesses == targets).cpu().numpy()[new.ravel()]
    return Sums(
        nats=np.where(new, losses.view(y.shape).cpu().double().numpy(), 0).sum(axis=0),
        counts=new.sum(axis=0),
        n_bytes=0 if byte_lengths is None else int(byte_lengths[y[new]].sum()),
        first_guesses=_by_confidence(confidence.cpu().double().numpy()[new.ravel()], right),
    )


def _by_confidence(
    confidence: NDArray[np.float64], right: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Return Sums.first_guesses of some targets; NaN goes into the last bin."""
    bins = np.searchsorted(CONFIDENCE_EDGES[1:-1], confidence)  # a bin holds its upper edge
    n = len(CONFIDENCE_EDGES) - 1
    weights = (None, confidence, right)
    return np.stack([np.bincount(bins, weight, minlength=n) for weight in weights])


def _windows(n_tokens: int, length: int, stride: int) -> NDArray[np.int64]:
    """Return rows (start, first new position) of windows: each target is new exactly once."""

    def rows() -> Iterator[tuple[int, int]]:
        done, start = 0, 0  # targets 0 .. done - 1 are counted; target t follows token t
        while done < n_tokens - 1:
            start = min(start, n_tokens - 1 - length)
            yield start, done - start
            done, start = start + length, start + min(stride, length)

    return np.array(list(rows()), dtype=np.int64)


def loss_nats(sums: Sums) -> float:
    """Return the mean negative log-likelihood, in nats per token."""
    return float(sums.nats.sum() / sums.counts.sum())


def bits_per_byte(sums: Sums) -> float:
    """Return the cross-entropy in bits per byte of the targets' text: nats / (ln 2 * bytes).

    Independent of the vocabulary, so models with different tokenizers can be compared.
    Raises InputError if there are no bytes.
    """
    if sums.n_bytes == 0:
        raise InputError("bits per byte of no text: all documents are empty; add text")
    return float(sums.nats.sum() / (math.log(2) * sums.n_bytes))


def accuracy(sums: Sums) -> float:
    """Return the share of the targets that were the model's most probable token."""
    n, _, right = sums.first_guesses.sum(axis=1)
    return float(right / n)


def calibration_error(sums: Sums) -> float:
    """Return the expected calibration error of the most probable tokens.

    Guo et al. 2017 ("On Calibration of Modern Neural Networks", eq. 3): the distance of confidence
    and accuracy in each bin, weighted by its targets.
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

    Neighbouring positions share a row where there are more, under the first of them. Rows without
    a target are left out.
    """
    firsts = np.arange(0, len(sums.counts), -(-len(sums.counts) // max_rows))
    counts = np.add.reduceat(sums.counts, firsts)
    nats = np.add.reduceat(sums.nats, firsts)
    return [(int(p), float(s / n)) for p, s, n in zip(firsts, nats, counts, strict=True) if n]


def calibration(sums: Sums) -> list[tuple[float, float, int, float, float]]:
    """Return a row for each bin with targets: edges, targets, mean confidence, accuracy."""
    rows = zip(pairwise(CONFIDENCE_EDGES), sums.first_guesses.T, strict=True)
    return [
        (float(low), float(high), int(n), float(confidence / n), float(right / n))
        for (low, high), (n, confidence, right) in rows
        if n
    ]


def validation_logits(model: ModelConfig, dtype: Dtype, windows: int) -> float:
    """Return the bytes of a batch's logits in `evaluate`: in `dtype`, in float32, log-softmax."""
    per_logit = 4 + 4 if dtype == "float32" else 2 + 4 + 4
    return float(windows * model.context_length * model.vocab_size * per_logit)
