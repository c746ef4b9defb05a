"""Baselines: the losses of predictors without a neural network."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm.data.splits import Splits
from lm.data.token_stream import TokenStream

CHUNK_TOKENS = 1 << 22
Ids = NDArray[Any] | TokenStream


def baseline_losses_nats(tokens: Splits) -> dict[str, float]:
    """Return the losses of the baselines on the validation split, in nats per token."""
    vocab_size = tokens.vocab_size
    unigram, bigram = Bigram(tokens.train.tokens, vocab_size).losses_nats(tokens.valid.tokens)
    return {"uniform": uniform_loss_nats(vocab_size), "unigram": unigram, "bigram": bigram}


def uniform_loss_nats(vocab_size: int) -> float:
    """Return the loss if all tokens are equally probable, in nats per token: ln V."""
    return math.log(vocab_size)


class Bigram:
    """Interpolated bigram model of a token sequence, with its unigram model inside.

    Witten and Bell 1991, as in Chen and Goodman 1999, eq. 15 to 17; h is the token before w:

        P(w | h) = (c(h, w) + n(h) P(w)) / (c(h) + n(h))      n(h): distinct followers of h
        P(w)     = (c(w) + 1) / (N + V)

    Only the pairs that occur are stored, as sorted keys h * V + w. Counts are exact as float64.
    """

    def __init__(self, tokens: Ids, vocab_size: int):
        self.vocab_size = vocab_size
        counts = np.zeros(vocab_size, dtype=np.int64)
        self.keys = np.empty(0, dtype=np.int64)
        self.pair_counts: NDArray[Any] = np.empty(0)
        for start in range(0, len(tokens), CHUNK_TOKENS):
            chunk = np.asarray(tokens[start : start + CHUNK_TOKENS + 1], dtype=np.int64)
            counts += np.bincount(chunk[:CHUNK_TOKENS], minlength=vocab_size)
            self._add(*np.unique(chunk[:-1] * vocab_size + chunk[1:], return_counts=True))
        self.unigram = (counts + 1) / (len(tokens) + vocab_size)  # (V,)
        first = self.keys // vocab_size
        self.history_counts = np.bincount(first, self.pair_counts, vocab_size)
        self.followers = np.bincount(first, minlength=vocab_size)

    def _add(self, keys: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        self.keys, places = np.unique(np.concatenate([self.keys, keys]), return_inverse=True)
        self.pair_counts = np.bincount(places, np.concatenate([self.pair_counts, counts]))

    def losses_nats(self, tokens: Ids) -> tuple[float, float]:
        """Return the unigram and bigram loss of every token but the first, in nats per token."""
        unigram = bigram = 0.0
        for start in range(0, len(tokens) - 1, CHUNK_TOKENS):
            chunk = np.asarray(tokens[start : start + CHUNK_TOKENS + 1], dtype=np.int64)
            history, targets = chunk[:-1], chunk[1:]
            unigram -= float(np.log(self.unigram[targets]).sum())
            bigram -= float(np.log(self.probability(history, targets)).sum())
        return unigram / (len(tokens) - 1), bigram / (len(tokens) - 1)

    def probability(
        self, history: NDArray[np.int64], targets: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Return P(target | history), element by element."""
        keys = history * self.vocab_size + targets
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        pairs = np.where(self.keys[places] == keys, self.pair_counts[places], 0)
        followers, seen = self.followers[history], self.history_counts[history]
        backed_off = pairs + followers * self.unigram[targets]
        return np.where(
            seen > 0, backed_off / np.maximum(seen + followers, 1), self.unigram[targets]
        )
