"""The user's files as documents, and the shards in which processes share them out.

    data.path, data.sources --find_sources--> files --cut_into_shards--> shards
                       shards --documents--> (place, bytes) --assign_splits--> train or valid

The order is fixed: sources as params.yaml lists them, files by path, documents as they stand.
Nothing is repaired or left out in silence: what cannot be read is an error that names the place,
and what was left out or replaced on request is counted.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, TypeVar, assert_never

from lm.base.console import ByteProgress
from lm.base.errors import InputError
from lm.data.shards import SplitName
from lm.prepare.file_bytes import opened
from lm.prepare.readers import reader_of, suffix_of
from lm.prepare.records import WHOLE, Bad, Found, Reader, ReadOptions
from lm.prepare.separators import holds
from lm.prepare.sources import DataConfig, SourceFiles, find_sources, text_root
from lm.prepare.workers import ordered_map

Result = TypeVar("Result")
REPLACED = "replacement characters"  # beside the reasons for which documents are left out
SHOWN_SUFFIX = re.compile(r"none|\.[a-z0-9.+_-]{1,16}")


class Stretch(NamedTuple):
    """A part of a file, in what its reader counts; `stop` None: to its end."""

    file: Path
    start: int
    stop: int | None


class Shard(NamedTuple):
    """What one process reads and one shard of tokens holds."""

    source: str
    options: ReadOptions
    stretches: tuple[Stretch, ...]
    size_bytes: int  # on the disk, about
    train_bytes: int = 0  # how much of its text is for training, if the tail is held out


class Place(NamedTuple):
    """Where a document stands; as text, e.g. "notes/a.md" or "books.jsonl:17"."""

    file: Path
    options: ReadOptions
    offset: int

    def __str__(self) -> str:
        if self.offset == WHOLE:
            return str(self.file)
        return reader_of(self.file, self.options).name(self.offset)


class Document(NamedTuple):
    """One text in UTF-8, and where it comes from."""

    place: Place
    data: bytes

    @property
    def text(self) -> str:
        return self.data.decode()


# --- shards -----------------------------------------------------------------------------


def cut_into_shards(config: DataConfig, found: Sequence[SourceFiles] | None = None) -> list[Shard]:
    """Cut the text, as it was found, into shards of about data.shard_bytes, in reading order.

    A long file is cut after multiples of that size, where a record begins. Short ones go together,
    and whether a file is the last of its shard is drawn from its name: so a file that comes or goes
    changes the shard that it stands in and no other (content-defined chunking, Muthitacharoen et
    al. 2001, by names).
    """
    root, found = text_root(config), find_sources(config) if found is None else found
    _require_separator(found)
    return [
        Shard(source.name, source.options, tuple(stretches), size_bytes)
        for source in found
        for stretches, size_bytes in _grouped(source, root, config.shard_bytes)
    ]


def _grouped(source: SourceFiles, root: Path, size: int) -> Iterator[tuple[list[Stretch], int]]:
    together: list[Stretch] = []
    held, at = 0, len(f"{root}/")
    for file in source.files:
        starts = reader_of(file, source.options).starts(size)
        length = file.stat().st_size
        if len(starts) > 1:
            if together:
                yield together, held
            together, held = [], 0
            for start, stop in zip(starts, [*starts[1:], None], strict=True):
                yield [Stretch(file, start, stop)], length // len(starts)
            continue
        together.append(Stretch(file, 0, None))
        held += length
        name = file.name if file == root else str(file)[at:]
        if draw(os.fsencode(name)) < length / size or held > 4 * size:
            yield together, held
            together, held = [], 0
    if together:
        yield together, held


def _require_separator(found: Sequence[SourceFiles]) -> None:
    """Raise InputError if there are text files and data.separator stands in none of them."""
    readers = (reader_of(file, source.options) for source in found for file in source.files)
    plain = [reader for reader in readers if reader.is_cut_by_separator]
    separator = plain[0].options.separator if plain else None
    if separator is None or _any_holds(plain, separator):
        return
    shown = partial(json.dumps, ensure_ascii=False)
    hint = "set it to what stands between two documents, or to null"
    for meant, cause in (
        (separator.replace(b"\\n", b"\n"), "it is a backslash and an n, the text has line breaks"),
        (separator.replace(b"\n", b"\r\n"), "the text has Windows line ends"),
        (separator.replace(b"\\n", b"\r\n"), "the text has Windows line ends"),
    ):
        if meant != separator and _any_holds(plain, meant):
            hint = f"{cause}: write {shown(meant.decode())} in params.yaml"
            break
    raise InputError(
        f"data.separator = {shown(separator.decode())}: stands in no text file; {hint}"
    )


def _any_holds(readers: Sequence[Reader], part: bytes) -> bool:
    for reader in readers:
        with opened(reader.file, reader.options.max_expansion) as stream:
            if holds(stream, part):
                return True
    return False


def kinds(shards: Iterable[Shard]) -> list[tuple[str, str, str, list[Path]]]:
    """Return source, suffix, how it is read, and the files; odd suffixes together."""
    found: dict[tuple[str, str, str], list[Path]] = {}
    for shard in shards:
        for file, start, _ in shard.stretches:
            if start == 0:
                suffix = suffix_of(file) or "none"
                suffix = suffix if SHOWN_SUFFIX.fullmatch(suffix) else "other"
                read_as = reader_of(file, shard.options).what.format(shard.options.text_field)
                found.setdefault((shard.source, suffix, read_as), []).append(file)
    return [(*key, files) for key, files in found.items()]


def over_shards(
    what: str, work: Callable[[Shard], Result], shards: Sequence[Shard], num_workers: int
) -> Iterator[Result]:
    """Return work(shard) for each shard, in their order, by several processes; show progress."""
    progress = ByteProgress(what, sum(shard.size_bytes for shard in shards))
    with closing(ordered_map(work, shards, num_workers)) as results:
        for shard, result in zip(shards, results, strict=True):
            progress.show(shard.size_bytes)
            yield result
    progress.close()


def draw(data: bytes) -> float:
    """Return a number in [0, 1) from the SHA-256 of some bytes."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little") / 2**64


# --- documents --------------------------------------------------------------------------


def documents(
    config: DataConfig, tally: Counter[str], shards: Iterable[Shard] | None = None
) -> Iterator[Document]:
    """Return every document that holds more than white space, of all shards or some.

    Counts in `tally` what it leaves out, by reason, and the characters it replaces. Raises
    InputError, naming the place, for a document that is not text, unless data.on_bad_document
    is "skip".
    """
    for shard in cut_into_shards(config) if shards is None else shards:
        for file, start, stop in shard.stretches:
            for record in reader_of(file, shard.options).read(start, stop):
                if not isinstance(record, Found):
                    if isinstance(record, Bad) and config.on_bad_document == "stop":
                        place = Place(file, shard.options, record.offset)
                        raise InputError(f"{place}: {record.message}")
                    tally[record.reason] += 1
                elif _is_blank(record.data):
                    tally["empty"] += 1
                else:
                    if record.replaced:
                        tally[REPLACED] += record.replaced
                    yield Document(Place(file, shard.options, record.offset), record.data)


def _is_blank(data: bytes) -> bool:
    """Return whether a text is white space alone; most show at their first byte that it is not."""
    return not (data and 0x20 < data[0] < 0x80) and not data.decode().strip()


def split_documents(
    config: DataConfig, tally: Counter[str]
) -> Iterator[tuple[SplitName, Document]]:
    """Return every document with its split. Raises InputError if a split stays empty."""
    counts = Counter[SplitName]()
    for shard in with_train_bytes(config, cut_into_shards(config), 1):
        for split, document in shard_documents(config, tally, shard):
            counts[split] += 1
            yield split, document
    require_both_splits(counts["train"], counts["valid"], config)


def shard_documents(
    config: DataConfig, tally: Counter[str], shard: Shard
) -> Iterator[tuple[SplitName, Document]]:
    """Return the documents of one shard with their splits."""
    return assign_splits(documents(config, tally, [shard]), config, shard.train_bytes)


def with_train_bytes(config: DataConfig, shards: Sequence[Shard], num_workers: int) -> list[Shard]:
    """Say in each shard where the tail begins, for which all of the text is measured first."""
    match config.split:
        case "hash":
            return list(shards)
        case "tail":
            sizes = list(ordered_map(partial(_text_bytes, config), shards, num_workers))
            boundary = tail_boundary(sum(sizes), config)
            starts = accumulate(sizes, initial=0)
            return [
                shard._replace(train_bytes=min(max(boundary - start, 0), size))
                for shard, start, size in zip(shards, starts, sizes, strict=False)
            ]
        case _:
            assert_never(config.split)


def _text_bytes(config: DataConfig, shard: Shard) -> int:
    return sum(len(document.data) for document in documents(config, Counter(), [shard]))


def assign_splits(
    found: Iterable[Document], config: DataConfig, train_bytes: int
) -> Iterator[tuple[SplitName, Document]]:
    """Assign documents to training or validation by data.split.

    "hash": by the SHA-256 of the text, so a document keeps its split when others come or go, and
    exact duplicates stay together. "tail": the bytes from `train_bytes` on are for validation;
    the document that holds this place is cut, at a line break where there is one.
    """
    match config.split:
        case "hash":
            for document in found:
                is_valid = draw(document.data) < config.valid_fraction
                yield ("valid" if is_valid else "train"), document
        case "tail":
            for place, data in found:
                cut = _cut_position(data, train_bytes)
                if cut > 0:
                    yield "train", Document(place, data[:cut])
                if cut < len(data):
                    yield "valid", Document(place, data[cut:])
                train_bytes -= len(data)
        case _:
            assert_never(config.split)


def tail_boundary(n_bytes: int, config: DataConfig) -> int:
    """Return how many bytes of a text are for training if its tail is held out."""
    return int(n_bytes * (1 - config.valid_fraction))


def require_both_splits(n_train: int, n_valid: int, config: DataConfig) -> None:
    """Raise InputError unless there are documents for training and for validation."""
    if n_train == n_valid == 0:
        raise InputError(f"data.path = {config.path}: no text")
    for split, n_documents in (("train", n_train), ("valid", n_valid)):
        if n_documents == 0:
            raise InputError(
                f"the {split} split has no documents; change data.valid_fraction, set data.split: "
                "tail (for one file or a few), cut the text with data.separator, or add text"
            )


def _cut_position(data: bytes, wanted: int) -> int:
    """Return where to cut UTF-8 text near a byte: after a line break, else between characters."""
    if wanted <= 0 or wanted >= len(data):
        return min(max(wanted, 0), len(data))
    after_line = data.find(b"\n", wanted) + 1
    if 0 < after_line < len(data):
        return after_line
    while wanted < len(data) and data[wanted] & 0xC0 == 0x80:  # inside a character
        wanted += 1
    return wanted
