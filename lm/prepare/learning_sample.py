"""The sample of the training text that a tokenizer learns from, of tokenizer.sample_bytes.

A document is in it by its own SHA-256, so the sample is the same for any number of processes, and
nearly the same after the text has grown.
"""

import hashlib
from collections import Counter
from contextlib import closing
from functools import partial
from io import BytesIO
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from lm.data.shards import SplitName
from lm.prepare.documents import (
    TextShard,
    cut_into_shards,
    over_shards,
    require_both_splits,
    shard_documents,
    with_train_bytes,
)
from lm.prepare.gigatoken_guard import split_at_nul
from lm.prepare.sources import DataConfig
from lm.prepare.workers import ordered_map

BINS = 1024  # the share of the documents that is taken is a multiple of 1 / BINS


def learning_sample(config: DataConfig, limit_bytes: int, num_workers: int) -> bytes:
    """Return documents for training, joined by NUL, which none holds: `limit_bytes` or less.

    Returns all of them if they fit, and at least one. Raises InputError if a split stays empty.
    """
    shards = with_train_bytes(config, cut_into_shards(config), num_workers)
    counts: Counter[SplitName] = Counter()
    n_bytes = np.zeros(BINS, dtype=np.int64)
    measure = partial(_measure, config)
    for shard_counts, shard_bytes in over_shards("reading", measure, shards, num_workers):
        counts.update(shard_counts)
        n_bytes += shard_bytes
    require_both_splits(counts["train"], counts["valid"], config)
    wanted = np.cumsum(n_bytes) <= limit_bytes
    n_bins = max(int(wanted.sum()), int(n_bytes.nonzero()[0][0]) + 1)
    seen, sample = set[bytes](), BytesIO()  # which hands its bytes out without a copy
    with closing(ordered_map(partial(_part, config, n_bins), shards, num_workers)) as found:
        for text in chain.from_iterable(map(split_at_nul, found)):
            if config.deduplicate:
                digest = hashlib.sha256(text).digest()
                if digest in seen:
                    continue
                seen.add(digest)
            sample.write(b"\0" + text if sample.tell() else text)
    return sample.getvalue()


def _measure(config: DataConfig, shard: TextShard) -> tuple[Counter[SplitName], NDArray[np.int64]]:
    """Return the number of documents in each split, and the bytes for training by bin, (BINS,)."""
    counts: Counter[SplitName] = Counter()
    n_bytes = np.zeros(BINS, dtype=np.int64)
    for split, document in shard_documents(config, Counter(), shard):
        counts[split] += 1
        if split == "train":
            n_bytes[_bin(document.data)] += len(document.data)
    return counts, n_bytes


def _part(config: DataConfig, n_bins: int, shard: TextShard) -> bytes:
    """Return the documents of one shard that are in the sample, joined by NUL."""
    found = shard_documents(config, Counter(), shard)
    texts = (document.data for split, document in found if split == "train")
    return b"\0".join(text for text in texts if _bin(text) < n_bins)


def _bin(text: bytes) -> int:
    """Return the bin of a text, from other bits of its hash than the split is drawn from."""
    return int.from_bytes(hashlib.sha256(text).digest()[8:10], "little") % BINS
