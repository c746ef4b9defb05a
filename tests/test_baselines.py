"""Baselines against counts by hand."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from lm.evaluate.baselines import Bigram, uniform_loss_nats


def by_hand(train, valid, vocab_size):
    """Unigram and Witten-Bell bigram loss, token by token in dictionaries."""
    counts, pairs = Counter(train), Counter(pairwise(train))
    followers = {h: len({b for a, b in pairs if a == h}) for h in counts}
    history = Counter(train[:-1])
    unigram = bigram = 0.0
    for h, w in pairwise(valid):
        p = (counts[w] + 1) / (len(train) + vocab_size)
        unigram -= math.log(p)
        if history[h]:
            p = (pairs[h, w] + followers[h] * p) / (history[h] + followers[h])
        bigram -= math.log(p)
    return unigram / (len(valid) - 1), bigram / (len(valid) - 1)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 22])
def test_losses_equal_counts_by_hand(monkeypatch, chunk):
    monkeypatch.setattr("lm.evaluate.baselines.CHUNK_TOKENS", chunk)
    random = np.random.default_rng(0)
    train, valid = random.zipf(1.5, 500) % 20, random.zipf(1.5, 90) % 25
    got = Bigram(train, 25).losses_nats(valid)
    assert got == pytest.approx(by_hand(train.tolist(), valid.tolist(), 25))


def test_probabilities_sum_to_one_after_any_token():
    bigram = Bigram(np.array([0, 1, 0, 2, 0, 1, 4]), 6)
    for history in range(6):
        total = bigram.probability(np.full(6, history), np.arange(6)).sum()
        assert total == pytest.approx(1.0)


def test_uniform_loss_is_the_logarithm_of_the_vocabulary():
    assert uniform_loss_nats(256) == pytest.approx(5.545177)
