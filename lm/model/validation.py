"""Sum the loss of a model over a split; lm/evaluate/metrics.py makes metrics of the sums."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lm.base.settings import Dtype
from lm.data.splits import Split, windows
from lm.machine.device import autocast, to_device
from lm.machine.processes import ALONE, Processes
from lm.model.transformer import TransformerLM

N_BINS = 15  # of equal width, as Guo et al. 2017
CONFIDENCE_EDGES = np.linspace(0, 1, N_BINS + 1)


@dataclass(frozen=True)
class Sums:
    """The sums over the targets of a split."""

    nats: NDArray[np.float64]  # (T,), by position in the window
    counts: NDArray[np.int64]  # (T,)
    n_bytes: int  # of the targets' text; 0 if not asked for
    # (3, 15): the most probable tokens by bin of their probability: count, sum, count of correct
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
    all, added in the same order for any number of processes.
    """
    length = model.config.context_length
    split.require(length)
    was_training = model.training
    model.eval()
    total = Sums(np.zeros(length), np.zeros(length, dtype=np.int64), 0, np.zeros((3, N_BINS)))
    table = _window_table(len(split.tokens), length, stride or length)
    if max_batches is not None and len(table) > (limit := max_batches * batch_size):
        table = table[np.arange(limit) * len(table) // limit]
    batches = np.split(table, range(batch_size, len(table), batch_size))
    for first in range(0, len(batches), processes.size):
        mine = min(first + processes.rank, len(batches) - 1)  # all processes have to gather
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
    """Return the sums of a batch of windows, given as rows of `_window_table`."""
    length, device = model.config.context_length, model.head.device
    x, y = windows(split.tokens, rows[:, 0], length)  # (B, T)
    ids = to_device(x, device)
    documents = model.documents(ids, split.end_id)
    with autocast(device, dtype):
        losses, guesses, confidence = model.guesses(ids, to_device(y, device), documents)
    new = np.arange(length) >= rows[:, 1:]  # (B, T)
    right = guesses.cpu().numpy()[new.ravel()] == y[new]
    sure = confidence.cpu().double().numpy()[new.ravel()]
    # a bin includes its upper edge; NaN is in the last
    bins = np.searchsorted(CONFIDENCE_EDGES[1:-1], sure)
    return Sums(
        nats=np.where(new, losses.view(y.shape).cpu().double().numpy(), 0).sum(axis=0),
        counts=new.sum(axis=0),
        n_bytes=0 if byte_lengths is None else int(byte_lengths[y[new]].sum()),
        first_guesses=np.stack([np.bincount(bins, w, N_BINS) for w in (None, sure, right)]),
    )


def _window_table(n_tokens: int, length: int, stride: int) -> NDArray[np.int64]:
    """Return rows (start, first new position) of windows: each target is new exactly once."""
    last, step = n_tokens - 1 - length, min(stride, length)
    starts = np.minimum(np.arange(0, last + step, step), last)
    first_new = np.concatenate([[0], starts[:-1] + length - starts[1:]])
    return np.stack([starts, first_new], axis=1)


def loss_nats(sums: Sums) -> float:
    """Return the mean negative log-likelihood, in nats per token."""
    return float(sums.nats.sum() / sums.counts.sum())
