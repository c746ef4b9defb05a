"""The sample of the training text that a tokenizer learns from, of tokenizer.sample_bytes.

A document is in it by its own SHA-256, so the sample is the same for any number of processes, and
nearly the same after the text has grown.
"""

import hashlib
from collections import Counter
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lm.base.files import writing
from lm.data.shards import SplitName
from lm.prepare.documents import (
    Shard,
    cut_into_shards,
    over_shards,
    require_both_splits,
    shard_documents,
    with_train_bytes,
)
from lm.prepare.separators import split_at
from lm.prepare.sources import DataConfig
from lm.prepare.workers import ordered_map

SEPARATOR = b"\0"  # follows each document; no text holds one
BINS = 1024  # the share of the documents that is taken is a multiple of 1 / BINS


def write_sample(config: DataConfig, limit_bytes: int, num_workers: int, file: Path) -> None:
    """Write documents for training, SEPARATOR after each, that together have at most so many bytes.

    All of them if they fit; at least one. Raises InputError if a split stays empty.
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
    seen: set[bytes] = set()
    work = partial(_write_part, config, n_bins, file)
    with (
        writing(file),
        open(file, "wb") as sample,
        closing(ordered_map(work, list(enumerate(shards)), num_workers)) as parts,
    ):
        for part in parts:
            with open(part, "rb") as stream:
                for _, text in split_at(stream, SEPARATOR, 0, None):
                    if text is None or (config.deduplicate and _add(text, seen)):
                        continue
                    sample.write(text + SEPARATOR)
            part.unlink()


def _measure(config: DataConfig, shard: Shard) -> tuple[Counter[SplitName], NDArray[np.int64]]:
    """Return how many documents each split has, and the bytes for training by bin, (BINS,)."""
    counts: Counter[SplitName] = Counter()
    n_bytes = np.zeros(BINS, dtype=np.int64)
    for split, document in shard_documents(config, Counter(), shard):
        counts[split] += 1
        if split == "train":
            n_bytes[_bin(document.data)] += len(document.data)
    return counts, n_bytes


def _write_part(config: DataConfig, n_bins: int, file: Path, item: tuple[int, Shard]) -> Path:
    number, shard = item
    part = file.with_name(f"{file.name}.{number}")
    with writing(part), open(part, "wb") as stream:
        for split, document in shard_documents(config, Counter(), shard):
            if split == "train" and _bin(document.data) < n_bins:
                stream.write(document.data + SEPARATOR)
    return part


def _bin(text: bytes) -> int:
    """Return the bin of a text, from other bits of its hash than the split is drawn from."""
    return int.from_bytes(hashlib.sha256(text).digest()[8:10], "little") % BINS


def _add(text: bytes, seen: set[bytes]) -> bool:
    """Add the text to `seen`; return whether it was there already."""
    n_before = len(seen)
    seen.add(hashlib.sha256(text).digest()[:16])
    return len(seen) == n_before
