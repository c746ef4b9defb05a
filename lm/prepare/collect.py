"""Collect done shards in data/tokens, without duplicates, and report on them.

KEPT/KEY.train ... --collect_shards--> data/tokens/train/SOURCE-00000.bin ... tokens.json
"""

import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm.base.files import writing
from lm.data.shards import COUNTS, SPLITS, ShardWriter, sums, token_dtype, write_manifest
from lm.data.tokenizer import Tokenizer
from lm.prepare.documents import REPLACED, TextShard, require_both_splits
from lm.prepare.encode_shards import FINGERPRINT, DoneShard, Job, kept_file
from lm.prepare.readers import reader_of, suffix_of
from lm.prepare.sources import in_words, weights

DOCUMENTS_AT_ONCE = 1 << 20  # compared at once to find duplicates: takes 50 MB
ROWS = 1 << 12  # documents copied at once
Duplicates = dict[tuple[int, str], NDArray[np.int64]]  # numbers of documents, by shard and split
Collected = tuple[DoneShard, dict[str, Any]]  # a shard and its entry in the manifest
SHOWN_SUFFIX = re.compile(r"none|\.[a-z0-9.+_-]{1,16}")
SHOWN_KINDS = 20  # rows of the table of files
FEW = 3  # texts beside tables are suspicious: a README, a license


def collect_shards(
    folder: Path,
    job: Job,
    tokenizer: Tokenizer,
    shards: Sequence[TextShard],
    done: Sequence[DoneShard],
) -> dict[str, Any]:
    """Fill `folder` with the shards, in their order; return a report on them.

    Raises InputError if no document is left for training or for validation.
    """
    shutil.rmtree(folder, ignore_errors=True)  # DVC would record any other file there, too
    for split in SPLITS:
        (folder / split).mkdir(parents=True)
    duplicates = find_duplicates(job.kept, done) if job.config.deduplicate else {}
    dtype, numbers = token_dtype(tokenizer.vocab_size), Counter[str]()
    collected: list[Collected] = []
    for i, (shard, kept) in enumerate(zip(shards, done, strict=True)):
        name = f"{shard.source}-{numbers[shard.source]:05}.bin"
        numbers[shard.source] += 1
        entry: dict[str, Any] = {"source": shard.source}
        for split in SPLITS:
            target = folder / split / name
            if (i, split) in duplicates:
                surplus = duplicates[i, split]
                entry[split] = _write_without(target, job.kept, kept, split, surplus, dtype)
            else:
                _link(kept_file(job.kept, kept["key"], split), target)
                counts = {count: kept[split][count] for count in COUNTS}
                sha256 = kept["files"][split]
                entry[split] = {"file": f"{split}/{name}", **counts, "sha256": sha256}
        collected.append((kept, entry))
    report = _report(tokenizer, collected)
    require_both_splits(report["train"]["documents"], report["valid"]["documents"], job.config)
    write_manifest(
        folder,
        vocab_size=tokenizer.vocab_size,
        end_id=tokenizer.end_id,
        tokenizer_sha256=job.tokenizer_sha256,
        sources=[{"name": name, "weight": weight} for name, weight in weights(job.config).items()],
        shards=[entry for _, entry in collected],
    )
    return report


def _link(kept: Path, file: Path) -> None:
    """Hard-link a file, which takes no space; copy it where links are not possible."""
    with writing(file):
        try:
            os.link(kept, file)
        except OSError:
            shutil.copyfile(kept, file)


# --- duplicates -------------------------------------------------------------------------


def find_duplicates(kept: Path, done: Sequence[DoneShard]) -> Duplicates:
    """Return the documents that repeat another, by the first half of the SHA-256 of their text.

    Of equal documents the first in the training split is kept, else the first. Digests are compared
    one slice of their values at a time, so memory does not grow with the corpus.
    """
    places = [(i, split) for split in SPLITS for i in range(len(done))]
    counts = [done[i][split]["documents"] for i, split in places]
    starts = np.array(list(accumulate(counts, initial=0)))
    n_slices = -(-int(starts[-1]) // DOCUMENTS_AT_ONCE)
    found: dict[tuple[int, str], list[NDArray[np.int64]]] = {}
    for number in range(n_slices):
        digests, numbers = [], []
        for (i, split), start in zip(places, starts[:-1], strict=True):
            table = _fingerprints(kept, done[i], split)
            mine = np.flatnonzero(table["digest"][:, 0] % np.uint64(n_slices) == number)
            digests.append(table["digest"][mine])
            numbers.append(mine + start)
        surplus = _all_but_first(np.concatenate(digests), np.concatenate(numbers))
        cuts = np.searchsorted(surplus, starts)
        for place, start, low, high in zip(places, starts[:-1], cuts[:-1], cuts[1:], strict=True):
            if low < high:
                found.setdefault(place, []).append(surplus[low:high] - start)
    return {place: np.sort(np.concatenate(parts)) for place, parts in found.items()}


def _all_but_first(digests: NDArray[np.uint64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the sorted numbers of all documents but the first of each digest, (n, 2)."""
    order = np.lexsort((numbers, digests[:, 0], digests[:, 1]))
    same = (digests[order[1:]] == digests[order[:-1]]).all(axis=1)
    return np.sort(numbers[order[1:][same]])


def _fingerprints(kept: Path, done: DoneShard, split: str) -> NDArray[Any]:
    return np.fromfile(kept_file(kept, done["key"], f"{split}.fingerprints"), dtype=FINGERPRINT)


def _write_without(
    target: Path,
    kept: Path,
    done: DoneShard,
    split: str,
    surplus: NDArray[np.int64],
    dtype: np.dtype[Any],
) -> dict[str, Any]:
    """Copy a shard without some of its documents; return its entry in the manifest."""
    table = _fingerprints(kept, done, split)
    wanted = np.ones(len(table), dtype=bool)
    wanted[surplus] = False
    whole = kept_file(kept, done["key"], split)
    with ShardWriter(target, dtype) as writer, open(whole, "rb") as stream:
        for low in range(0, len(table), ROWS):
            rows, keep = table[low : low + ROWS], wanted[low : low + ROWS]
            ids = np.fromfile(stream, dtype=dtype, count=int(rows["tokens"].sum()))
            ids = ids[np.repeat(keep, rows["tokens"])]
            writer.append(ids, int(rows["bytes"][keep].sum()), int(keep.sum()))
    return writer.entry()


# --- the report -------------------------------------------------------------------------


def _report(tokenizer: Tokenizer, collected: Sequence[Collected]) -> dict[str, Any]:
    """Return counts of all documents and by source, as JSON without clock or path."""
    by_source: dict[str, list[Collected]] = {}
    for done, entry in collected:
        by_source.setdefault(entry["source"], []).append((done, entry))
    return {
        "vocabulary": tokenizer.vocab_size,
        **_summary(collected),
        "sources": {name: _summary(shards) for name, shards in by_source.items()},
    }


def _summary(collected: Sequence[Collected]) -> dict[str, Any]:
    splits: dict[str, Any] = {
        split: sums([entry[split] for _, entry in collected]) for split in SPLITS
    }
    total = sums(list(splits.values()))
    tally, used = Counter[str](), np.zeros(1, dtype=np.uint8)
    n_documents = sum(done[split]["documents"] for done, _ in collected for split in SPLITS)
    for done, _ in collected:
        tally.update(done["tally"])
        used = used | np.frombuffer(bytes.fromhex(done["used"]), dtype=np.uint8)
    replaced = tally.pop(REPLACED, 0)
    return {
        **total,
        "bytes_per_token": round(total["bytes"] / max(1, total["tokens"]), 4),
        "longest_document_bytes": max(done["longest_bytes"] for done, _ in collected),
        "vocabulary_used": int(np.bitwise_count(used).sum()),
        "duplicates": n_documents - total["documents"],
        "replacement_characters": replaced,
        "left_out": dict(sorted(tally.items())),
        **splits,
    }


def files_table(shards: Sequence[TextShard], left_out: Counter[str]) -> str:
    """Return a Markdown table: files by suffix and how they were read; files not read below it."""
    kinds: dict[tuple[str, str, str], list[str]] = {}  # names by source, suffix and way of reading
    for shard in shards:
        for file, start, _ in shard.stretches:
            if start == 0:
                suffix = suffix_of(file) or "none"
                suffix = suffix if SHOWN_SUFFIX.fullmatch(suffix) else "other"
                read_as = reader_of(file, shard.options).description.format(
                    shard.options.text_field
                )
                kinds.setdefault((shard.source, suffix, read_as), []).append(file.name)
    order = sorted(kinds.items(), key=lambda kind: (kind[0][0], -len(kind[1]), kind[0][1]))
    lines = ["| source | suffix | files | read as |", "|--------|--------|------:|---------|"]
    for (source, suffix, read_as), names in order[:SHOWN_KINDS]:
        lines.append(f"| {source} | {suffix} | {len(names):,} | {read_as} |")
    if rest := order[SHOWN_KINDS:]:
        lines.append(f"| | {len(rest):,} more | {sum(len(names) for _, names in rest):,} | |")
    for source in dict.fromkeys(key[0] for key, _ in order):
        mine = [(key, names) for key, names in order if key[0] == source]
        texts = [name for key, names in mine if key[2] == "text" for name in names]
        others = [(key[1], len(names)) for key, names in mine if key[2] != "text"]
        if texts and others and len(texts) <= max(FEW, others[0][1]):
            name = "".join(c if c.isprintable() else "?" for c in texts[0])
            more = f" and {len(texts) - 1:,} more" if texts[1:] else ""
            beside = f"read as text beside {others[0][1]:,} {others[0][0]} files"
            lines += ["", f"{name}{more} {beside}: exclude by data.glob what should not be learned"]
    if +left_out:
        lines += ["", f"Files not read: {in_words(left_out)}"]
    return "\n".join(lines) + "\n"
