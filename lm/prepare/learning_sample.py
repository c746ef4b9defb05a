"""Sample the training text that a tokenizer learns from, tokenizer.sample_bytes at most.

The SHA-256 of a document decides whether it is in the sample. So the sample is the same for any
number of processes, and nearly the same after the text has grown.
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

BINS = 1024  # documents fall into bins by their hash; the sample is the first bins


def learning_sample(config: DataConfig, limit_bytes: int, num_workers: int) -> bytes:
    """Return documents for training, joined by NUL, a byte that none holds: `limit_bytes` at most.

    Returns all if they fit, else at least one bin. Raises InputError if a split stays empty.
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
    seen, sample = set[bytes](), BytesIO()  # gives its bytes without a copy
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
    """Return the bin of a text, from bits of its hash that the split does not use."""
    return int.from_bytes(hashlib.sha256(text).digest()[8:10], "little") % BINS
