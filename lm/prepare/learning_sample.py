"""A sample of the training text to learn a tokenizer from: as large as wanted and no larger.

A document is in it by its own SHA-256, so the sample is the same for any number of processes, and
nearly the same after the text has grown.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lm.base.console import ByteProgress
from lm.base.files import writing
from lm.prepare.documents import DataConfig, Side, documents, plan, require_both_sides, sides
from lm.prepare.encode_shards import Task, tasks
from lm.prepare.formats import records
from lm.prepare.workers import ordered_map

SEPARATOR = b"\0"  # follows each document; no text holds one
BINS = 1024  # the share of the documents that is taken is a multiple of 1 / BINS


class Measured(NamedTuple):
    """The documents of a shard: how many of each side, the bytes for training by bin, (BINS,)."""

    counts: Counter[Side]
    n_bytes: NDArray[np.int64]


def write_sample(config: DataConfig, limit_bytes: int, num_workers: int, file: Path) -> None:
    """Write documents for training, SEPARATOR after each, that together have at most so many bytes.

    All of them if they fit; at least one. Raises InputError as documents.split_documents does.
    """
    todo = tasks(config, plan(config), num_workers)
    counts: Counter[Side] = Counter()
    n_bytes = np.zeros(BINS, dtype=np.int64)
    progress = ByteProgress("reading", sum(task.shard.size_bytes for task in todo))
    with closing(ordered_map(partial(_measure, config), todo, num_workers)) as measured:
        for task, shard in zip(todo, measured, strict=True):
            counts.update(shard.counts)
            n_bytes += shard.n_bytes
            progress.show(task.shard.size_bytes)
    progress.close()
    require_both_sides(counts["train"], counts["valid"], config)
    wanted = np.cumsum(n_bytes) <= limit_bytes
    n_bins = max(int(wanted.sum()), int(n_bytes.nonzero()[0][0]) + 1)
    seen: set[bytes] = set()
    work = partial(_write_part, config, n_bins, file)
    with (
        writing(file),
        open(file, "wb") as sample,
        closing(ordered_map(work, list(enumerate(todo)), num_workers)) as parts,
    ):
        for part in parts:
            with open(part, "rb") as stream:
                for _, text in records(stream, SEPARATOR, 0, None):
                    if text is None or (config.deduplicate and _stood_before(text, seen)):
                        continue
                    sample.write(text + SEPARATOR)
            part.unlink()


def _training(config: DataConfig, task: Task) -> Iterator[tuple[Side, bytes]]:
    found = documents(config, Counter(), [task.shard])
    return ((side, document.data) for side, document in sides(found, config, task.train_bytes))


def _measure(config: DataConfig, task: Task) -> Measured:
    counts: Counter[Side] = Counter()
    n_bytes = np.zeros(BINS, dtype=np.int64)
    for side, text in _training(config, task):
        counts[side] += 1
        if side == "train":
            n_bytes[_bin(text)] += len(text)
    return Measured(counts, n_bytes)


def _write_part(config: DataConfig, n_bins: int, file: Path, item: tuple[int, Task]) -> Path:
    number, task = item
    part = file.with_name(f"{file.name}.{number}")
    with writing(part), open(part, "wb") as stream:
        for side, text in _training(config, task):
            if side == "train" and _bin(text) < n_bins:
                stream.write(text + SEPARATOR)
    return part


def _bin(text: bytes) -> int:
    """From other bits of the hash than the split is drawn from."""
    return int.from_bytes(hashlib.sha256(text).digest()[8:10], "little") % BINS


def _stood_before(text: bytes, seen: set[bytes]) -> bool:
    """Whether `seen` has the text; it has it then."""
    digest = hashlib.sha256(text).digest()[:16]
    if digest in seen:
        return True
    seen.add(digest)
    return False
