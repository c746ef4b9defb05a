"""Choose the windows of a batch: arithmetic on (seed, step), without state or files.

    window n of the run --deal--> window i of a source --random | epochs | documents--> its start

Shares of sources are exact: see `deal`. Orders are permutations that are computed, not stored.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm.base import rng

Numbers = NDArray[np.int64]
GROUP_DOCUMENTS = 64  # sums of windows are kept by group; a look-up counts those of one group
GROUPS_AT_ONCE = 4096  # counted at once, in 8-byte numbers


@dataclass(frozen=True)
class Node:
    """A set of sources: their total weight, and its lighter and heavier half."""

    weight: Fraction
    source: int  # its number, in a leaf
    halves: tuple["Node", "Node"] | None  # in a branch


@lru_cache
def tree(weights: tuple[float, ...]) -> Node:
    """Return Huffman's tree of the sources: join the two lightest parts until one is left.

    A weight is the decimal number as written: 0.1 is one tenth.
    """
    parts = [(Fraction(str(w)), i, Node(Fraction(str(w)), i, None)) for i, w in enumerate(weights)]
    heapq.heapify(parts)
    for number in range(len(weights), 2 * len(weights) - 1):
        (light, _, one), (heavy, _, other) = heapq.heappop(parts), heapq.heappop(parts)
        heapq.heappush(parts, (light + heavy, number, Node(light + heavy, -1, (one, other))))
    return parts[0][2]


def deal(weights: tuple[float, ...], numbers: Numbers) -> tuple[Numbers, Numbers]:
    """Return the source of each window of the run, and its number among that source's windows.

    At every branch of the tree the heavier half gets round(n q) of the first n windows, where q is
    its exact share. A branch adds an error of at most 1/2, which shrinks on the way down: after n
    windows the count of a source differs from n times its share by at most 1/2 for two sources, by
    less than 1 for three, and by less than 1.68 for any number (half the sum of 1 / Fibonacci's
    numbers).
    """
    sources, within = np.empty_like(numbers), np.empty_like(numbers)

    def descend(node: Node, places: Numbers, numbers: Numbers) -> None:
        if node.halves is None:
            sources[places], within[places] = node.source, numbers
        elif len(places):
            light, heavy = node.halves
            share = heavy.weight / node.weight
            before, after = _rounded(numbers, share), _rounded(numbers + 1, share)
            taken = after > before
            descend(heavy, places[taken], before[taken])
            descend(light, places[~taken], (numbers - before)[~taken])

    descend(tree(weights), np.arange(len(numbers)), numbers)
    return sources, within


def _rounded(numbers: Numbers, share: Fraction) -> Numbers:
    """Return round(numbers * share), halves up, exactly."""
    top, bottom = 2 * share.numerator, 2 * share.denominator
    exact: NDArray[np.object_] | Numbers = numbers
    if int(numbers.max()) * top + bottom >= 1 << 63:
        exact = numbers.astype(object)  # Python's integers have no end
    return ((exact * top + share.denominator) // bottom).astype(np.int64)


def random_places(seed: int, steps: range, batch_size: int, size: int) -> Numbers:
    """Return places in range(size), drawn with replacement, (len(steps) * batch_size,)."""
    return np.concatenate(
        [rng.random_integers(rng.seed(seed, "batch", step), batch_size, size) for step in steps]
    )


def epoch_places(seed: int, numbers: Numbers, size: int, *stream: int) -> Numbers:
    """Return entries `numbers` of an endless walk through range(size).

    Each epoch visits every place once, in its own order; `stream` selects another walk.
    """
    epochs, within = np.divmod(numbers, size)
    places = np.empty_like(numbers)
    for epoch in np.unique(epochs).tolist():
        mine, key = epochs == epoch, rng.seed(seed, "epoch", epoch, *stream)
        places[mine] = rng.permuted(key, within[mine], size)
    return places


class DocumentWindows:
    """The windows of a text cut document by document; takes 4.25 bytes a document.

    A document of n tokens and its end token has ceil(n / T) windows of T tokens, the first at its
    start. So all its tokens but the first are targets, and its end token too. Its last window
    continues into the text that follows.
    """

    def __init__(self, chunks: Iterable[NDArray[Any]], end_id: int, context_length: int):
        """Find the documents of a text, given as consecutive chunks of its ids."""
        self.context_length = context_length
        lengths, size, last_end = [], 0, -1
        for chunk in chunks:
            ends = np.flatnonzero(chunk == end_id) + size
            lengths.append(np.diff(ends, prepend=last_end).astype(np.uint32))
            size, last_end = size + len(chunk), int(ends[-1]) if len(ends) else last_end
        rest = [size - 1 - last_end] if size - 1 > last_end else []  # a document without an end
        n_documents = sum(map(len, lengths)) + len(rest)
        padding = np.ones(-n_documents % GROUP_DOCUMENTS, dtype=np.uint32)  # empty documents
        self._lengths = np.concatenate([*lengths, np.array(rest, dtype=np.uint32), padding])
        self._lengths = self._lengths.reshape(-1, GROUP_DOCUMENTS)
        firsts = range(0, len(self._lengths), GROUPS_AT_ONCE)
        parts = [self._lengths[i : i + GROUPS_AT_ONCE] for i in firsts]
        tokens = [part.sum(axis=1, dtype=np.int64) for part in parts]
        windows = [self._counts(part).sum(axis=1) for part in parts]
        self._tokens, self._windows = (
            np.cumsum(np.concatenate([[0], *s])) for s in (tokens, windows)
        )

    def __len__(self) -> int:
        return int(self._windows[-1])

    def _counts(self, lengths: NDArray[np.uint32]) -> Numbers:
        return -(-(lengths.astype(np.int64) - 1) // self.context_length)

    def starts(self, numbers: Numbers) -> Numbers:
        """Return the place of the first token of windows, by their numbers in the text."""
        groups = np.searchsorted(self._windows, numbers, side="right") - 1
        lengths = self._lengths[groups]  # (B, GROUP_DOCUMENTS)
        counts = self._counts(lengths)
        before = counts.cumsum(axis=1) - counts
        within = numbers - self._windows[groups]
        # the last document that is not empty and begins at or before the window
        documents = ((before <= within[:, None]) & (counts > 0)).cumsum(axis=1).argmax(axis=1)
        rows = np.arange(len(numbers))
        tokens = lengths.cumsum(axis=1, dtype=np.int64) - lengths
        return (
            self._tokens[groups]
            + tokens[rows, documents]
            + (within - before[rows, documents]) * self.context_length
        )
