"""The floor of a grammar's text: its entropy, which no model can beat."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from lm.base.errors import InputError
from lm.corpus.grammar import STORIES
from lm.data.splits import Split
from lm.data.tokenizer import Tokenizer

CHANCE = 0.001  # share of the floor by which a model may be below it: rounding


def floor(metrics: dict[str, Any], valid: Split, tokenizer: Tokenizer) -> dict[str, float]:
    """Return the lowest bits per byte that a model can reach here, and this model's distance.

    floor_bits_per_byte = sum of bits(document) / bytes, with the bytes of `bits_per_byte`. Model
    and grammar count the same events. The end token after a story costs the best model nothing,
    because no story is a prefix of another. The model does not predict the split's first token,
    which costs nothing either, because every story begins with the same word.

    The floor is -log2 of the true probability of the validation text, not an estimate. A model that
    has not seen the text saves k bits on it with probability below 2^-k (Markov's inequality: the
    expectation of q(x) / p(x) is at most 1). Raises InputError if the model is below the floor by
    more than CHANCE of it, or the text is not the grammar's.
    """
    bits = 0.0
    for number, text in enumerate(document_texts(valid, tokenizer), start=1):
        try:
            bits += STORIES.bits(text)
        except ValueError as error:
            raise InputError(
                f"data/tokens: document {number} of the validation split is not of the grammar "
                f"({error}); corpus.source: grammar needs data.path: data/raw and data.split: hash"
            ) from None
    lowest, found = bits / metrics["bytes"], metrics["bits_per_byte"]
    if not found >= lowest * (1 - CHANCE):
        raise InputError(
            f"models/model: {found:.4f} bits per byte are below the entropy of the held-out text, "
            f"{lowest:.4f}: the model has seen this text in training, or there is a bug"
        )
    return {"floor_bits_per_byte": lowest, "distance_to_floor": found / lowest - 1}


def document_texts(split: Split, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the text of each document of a split, without its end token."""
    ids = split.tokens[: len(split.tokens)]
    for document in np.split(ids, np.flatnonzero(ids == tokenizer.end_id) + 1)[:-1]:
        yield tokenizer.decode(document[:-1].tolist())
