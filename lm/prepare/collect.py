"""Done shards to a folder of tokens: duplicates left out, all counted, the manifest last.

KEPT/KEY.train ... --publish--> data/tokens/train/SOURCE-00000.bin ... tokens.json, and a report
"""

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lm.base.files import writing
from lm.data.shards import COUNTS, SPLITS, ShardWriter, token_dtype, write_manifest
from lm.data.tokenizer import Tokenizer
from lm.prepare.documents import REPLACED, Shard, require_both_sides, weights
from lm.prepare.encode_shards import FINGERPRINT, Job, Record, kept_file

DOCUMENTS_AT_ONCE = 1 << 20  # compared with each other when duplicates are sought: 50 MB
ROWS = 1 << 12  # documents, copied at once
Dropped = dict[tuple[int, str], NDArray[np.int64]]  # by shard and side: numbers of documents


def publish(
    folder: Path, job: Job, tokenizer: Tokenizer, shards: Sequence[Shard], records: list[Record]
) -> dict[str, Any]:
    """Fill `folder` with the shards in the order of the plan; returns a report of what they hold.

    Raises InputError if no document is left for training or for validation.
    """
    shutil.rmtree(folder, ignore_errors=True)  # what else lies there DVC would take for an output
    for side in SPLITS:
        (folder / side).mkdir(parents=True)
    dropped = duplicates(job.kept, records) if job.config.deduplicate else {}
    dtype, numbers, shown = token_dtype(tokenizer.vocab_size), Counter[str](), []
    for i, (shard, record) in enumerate(zip(shards, records, strict=True)):
        name = f"{shard.source}-{numbers[shard.source]:05}.bin"
        numbers[shard.source] += 1
        entry: dict[str, Any] = {"source": shard.source}
        for side in SPLITS:
            file, kept = folder / side / name, kept_file(job.kept, record["key"], side)
            if (i, side) in dropped:
                table = _fingerprints(job.kept, record, side)
                entry[side] = _write_without(file, kept, table, dropped[i, side], dtype)
            else:
                _link(kept, file)
                counts = {count: record[side][count] for count in COUNTS}
                entry[side] = {"file": f"{side}/{name}", **counts, "sha256": record["files"][side]}
        n_duplicates = sum(len(dropped.get((i, side), ())) for side in SPLITS)
        shown.append(Shown(record, entry, n_duplicates))
    report = _report(tokenizer, shown)
    require_both_sides(report["train"]["documents"], report["valid"]["documents"], job.config)
    write_manifest(
        folder,
        vocab_size=tokenizer.vocab_size,
        end_id=tokenizer.end_id,
        tokenizer_sha256=job.tokenizer_sha256,
        sources=[{"name": name, "weight": weight} for name, weight in weights(job.config).items()],
        shards=[part.entry for part in shown],
    )
    return report


def _link(kept: Path, file: Path) -> None:
    """The same file under another name: it costs no space. A copy where that cannot be."""
    with writing(file):
        try:
            os.link(kept, file)
        except OSError:
            shutil.copyfile(kept, file)


# --- duplicates -------------------------------------------------------------------------


def duplicates(kept: Path, records: Sequence[Record]) -> Dropped:
    """The documents that stood before, by the SHA-256 of their text (its first half).

    Of equal ones the first of the training split stays, else the first. The digests of a slice of
    all values are compared at a time, so memory does not grow with the corpus.
    """
    places = [(i, side) for side in SPLITS for i in range(len(records))]
    counts = [records[i][side]["documents"] for i, side in places]
    starts = np.array(list(accumulate(counts, initial=0)))
    n_slices = -(-int(starts[-1]) // DOCUMENTS_AT_ONCE)
    dropped: dict[tuple[int, str], list[NDArray[np.int64]]] = {}
    for number in range(n_slices):
        surplus = _surplus(*_digests(kept, records, places, starts, number, n_slices))
        cuts = np.searchsorted(surplus, starts)
        for place, start, low, high in zip(places, starts[:-1], cuts[:-1], cuts[1:], strict=True):
            if low < high:
                dropped.setdefault(place, []).append(surplus[low:high] - start)
    return {place: np.sort(np.concatenate(parts)) for place, parts in dropped.items()}


def _digests(
    kept: Path,
    records: Sequence[Record],
    places: Sequence[tuple[int, str]],
    starts: NDArray[np.int64],
    number: int,
    n_slices: int,
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The digests of one slice, (n, 2), and the documents' numbers in the whole corpus, (n,)."""
    digests, numbers = [], []
    for (i, side), start in zip(places, starts[:-1], strict=True):
        table = _fingerprints(kept, records[i], side)
        mine = np.flatnonzero(table["digest"][:, 0] % np.uint64(n_slices) == number)
        digests.append(table["digest"][mine])
        numbers.append(mine + start)
    return np.concatenate(digests), np.concatenate(numbers)


def _surplus(digests: NDArray[np.uint64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers, sorted, of all but the first of each digest."""
    order = np.lexsort((numbers, digests[:, 0], digests[:, 1]))
    same = (digests[order[1:]] == digests[order[:-1]]).all(axis=1)
    return np.sort(numbers[order[1:][same]])


def _fingerprints(kept: Path, record: Record, side: str) -> NDArray[Any]:
    return np.fromfile(kept_file(kept, record["key"], f"{side}.fingerprints"), dtype=FINGERPRINT)


def _write_without(
    file: Path, kept: Path, table: NDArray[Any], dropped: NDArray[np.int64], dtype: np.dtype[Any]
) -> dict[str, Any]:
    """Copy a shard without some of its documents; returns its entry in the manifest."""
    wanted = np.ones(len(table), dtype=bool)
    wanted[dropped] = False
    with ShardWriter(file, dtype) as writer, open(kept, "rb") as stream:
        for low in range(0, len(table), ROWS):
            rows, keep = table[low : low + ROWS], wanted[low : low + ROWS]
            ids = np.fromfile(stream, dtype=dtype, count=int(rows["tokens"].sum()))
            ids = ids[np.repeat(keep, rows["tokens"])]
            writer.append(ids, int(rows["bytes"][keep].sum()), int(keep.sum()))
    return writer.entry()


# --- the report -------------------------------------------------------------------------


class Shown(NamedTuple):
    """A shard in the report."""

    record: Record
    entry: dict[str, Any]
    n_duplicates: int


def _report(tokenizer: Tokenizer, shown: Sequence[Shown]) -> dict[str, Any]:
    """What the tokens hold, in all and by source: a JSON object without clock or path."""
    names = dict.fromkeys(part.entry["source"] for part in shown)
    return {
        "vocabulary": tokenizer.vocab_size,
        **_summary(shown),
        "sources": {
            name: _summary([part for part in shown if part.entry["source"] == name])
            for name in names
        },
    }


def _summary(shown: Sequence[Shown]) -> dict[str, Any]:
    sides = {s: {c: sum(part.entry[s][c] for part in shown) for c in COUNTS} for s in SPLITS}
    total = {count: sum(side[count] for side in sides.values()) for count in COUNTS}
    tally, duplicates = Counter[str](), 0
    used: Any = np.uint8(0)
    for part in shown:
        tally.update(part.record["tally"])
        used = used | np.frombuffer(bytes.fromhex(part.record["used"]), dtype=np.uint8)
        duplicates += part.n_duplicates
    replaced = tally.pop(REPLACED, 0)
    return {
        **total,
        "bytes_per_token": round(total["bytes"] / max(1, total["tokens"]), 4),
        "longest_document_bytes": max(part.record["longest_bytes"] for part in shown),
        "vocabulary_used": int(np.bitwise_count(used).sum()),
        "duplicates": duplicates,
        "replacement_characters": replaced,
        "left_out": dict(sorted(tally.items())),
        **sides,
    }
