"""Read the user's files as documents, cut into shards for several processes.

    data.path, data.sources --find_sources--> files --cut_into_shards--> shards
                       shards --read_documents--> (place, bytes) --assign_splits--> train or valid

The order is fixed: sources as params.yaml lists them, files by path, documents by place.
Text that cannot be read is an error that names its place. If the settings leave out documents or
replace characters instead, these are counted.
"""

import hashlib
import json
import os
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
from lm.prepare.readers import reader_of
from lm.prepare.readers.text import Text
from lm.prepare.records import Bad, Found, Reader, ReadOptions
from lm.prepare.sources import DataConfig, SourceFiles, find_sources, text_root
from lm.prepare.workers import ordered_map

Result = TypeVar("Result")
STOPS = {"stop": True, "skip": False}  # by data.on_bad_document
REPLACED = "replacement characters"  # counted beside the reasons for leaving out documents


class Stretch(NamedTuple):
    """A part of a file, in the unit of its reader; stop = None means the end."""

    file: Path
    start: int
    stop: int | None


class TextShard(NamedTuple):
    """The text of one shard of tokens: one process reads it."""

    source: str
    options: ReadOptions
    stretches: tuple[Stretch, ...]
    size_bytes: int  # on disk, about
    train_bytes: int = 0  # with data.split: tail, the size of its text for training


class Document(NamedTuple):
    """One text in UTF-8, and where it comes from: a reader and an offset."""

    reader: Reader
    offset: int
    data: bytes

    @property
    def text(self) -> str:
        return self.data.decode()

    @property
    def place(self) -> str:
        """Return e.g. "notes/a.md" or "books.jsonl:17"."""
        return self.reader.place(self.offset)


# --- shards -----------------------------------------------------------------------------


def cut_into_shards(
    config: DataConfig, found: Sequence[SourceFiles] | None = None
) -> list[TextShard]:
    """Cut the text into shards of about data.shard_bytes, in reading order.

    A long file is cut after multiples of that size, where a record begins. Short files share a
    shard, and a hash of a file's name decides whether it is the last of its shard. So adding or
    removing a file changes only its own shard (content-defined chunking, Muthitacharoen et al.
    2001, by names).
    """
    root, found = text_root(config), find_sources(config) if found is None else found
    _require_separator(found)
    return [
        TextShard(source.name, source.options, tuple(stretches), size_bytes)
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
    """Raise InputError if there are text files and none of them holds data.separator."""
    readers = (reader_of(file, source.options) for source in found for file in source.files)
    plain = [reader for reader in readers if isinstance(reader, Text) and reader.is_plain]
    separator = plain[0].options.separator if plain else None
    if separator is None or any(reader.holds(separator) for reader in plain):
        return
    shown = partial(json.dumps, ensure_ascii=False)
    hint = "set it to what stands between two documents, or to null"
    breaks = separator.replace(b"\\n", b"\n")
    for meant, cause in (
        (breaks, "it is a backslash and an n, but the text has line breaks"),
        (breaks.replace(b"\n", b"\r\n"), "the text has Windows line ends"),
    ):
        if meant != separator and any(reader.holds(meant) for reader in plain):
            hint = f"{cause}: write {shown(meant.decode())} in params.yaml"
            break
    raise InputError(
        f"data.separator = {shown(separator.decode())}: does not occur in any text file; {hint}"
    )


def over_shards(
    what: str, work: Callable[[TextShard], Result], shards: Sequence[TextShard], num_workers: int
) -> Iterator[Result]:
    """Yield work(shard) for each shard, in their order, by several processes; show progress."""
    progress = ByteProgress(what, sum(shard.size_bytes for shard in shards))
    with closing(ordered_map(work, shards, num_workers)) as results:
        for shard, result in zip(shards, results, strict=True):
            progress.show(shard.size_bytes)
            yield result
    progress.close()


def draw(data: bytes) -> float:
    """Return a number in [0, 1) from the SHA-256 of the data."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little") / 2**64


# --- documents --------------------------------------------------------------------------


def read_documents(
    config: DataConfig, tally: Counter[str], shards: Iterable[TextShard] | None = None
) -> Iterator[Document]:
    """Yield every document that is not empty or white space, of all shards or of some.

    Counts in `tally` the documents left out, by reason, and the characters replaced. Raises
    InputError, which names the place, for a document that is not text, unless
    data.on_bad_document is "skip".
    """
    stops = STOPS[config.on_bad_document]
    for shard in cut_into_shards(config) if shards is None else shards:
        for file, start, stop in shard.stretches:
            reader = reader_of(file, shard.options)
            for record in reader.read(start, stop):
                if not isinstance(record, Found):
                    if stops and isinstance(record, Bad):
                        raise InputError(f"{reader.place(record.offset)}: {record.message}")
                    tally[record.reason] += 1
                elif _is_blank(record.data):
                    tally["empty"] += 1
                else:
                    if record.replaced:
                        tally[REPLACED] += record.replaced
                    yield Document(reader, record.offset, record.data)


def _is_blank(data: bytes) -> bool:
    """Return whether a text is only white space; for most texts the first byte decides."""
    return not (data and 0x20 < data[0] < 0x80) and not data.decode().strip()


def split_documents(
    config: DataConfig, tally: Counter[str]
) -> Iterator[tuple[SplitName, Document]]:
    """Yield every document with its split. Raises InputError if a split stays empty."""
    counts = Counter[SplitName]()
    for shard in with_train_bytes(config, cut_into_shards(config), 1):
        for split, document in shard_documents(config, tally, shard):
            counts[split] += 1
            yield split, document
    require_both_splits(counts["train"], counts["valid"], config)


def shard_documents(
    config: DataConfig, tally: Counter[str], shard: TextShard
) -> Iterator[tuple[SplitName, Document]]:
    """Yield the documents of one shard with their splits."""
    return assign_splits(read_documents(config, tally, [shard]), config, shard.train_bytes)


def with_train_bytes(
    config: DataConfig, shards: Sequence[TextShard], num_workers: int
) -> list[TextShard]:
    """Set `train_bytes` of each shard if data.split is "tail"; this reads all of the text."""
    match config.split:
        case "hash":
            return list(shards)
        case "tail":
            sizes = list(ordered_map(partial(_text_bytes, config), shards, num_workers))
            boundary = int(sum(sizes) * (1 - config.valid_fraction))
            starts = accumulate(sizes, initial=0)
            return [
                shard._replace(train_bytes=min(max(boundary - start, 0), size))
                for shard, start, size in zip(shards, starts, sizes, strict=False)
            ]
        case _:
            assert_never(config.split)


def _text_bytes(config: DataConfig, shard: TextShard) -> int:
    return sum(len(document.data) for document in read_documents(config, Counter(), [shard]))


def assign_splits(
    found: Iterable[Document], config: DataConfig, train_bytes: int
) -> Iterator[tuple[SplitName, Document]]:
    """Assign documents to training or validation by data.split.

    "hash" uses the SHA-256 of the text: a document keeps its split when others are added or
    removed, and exact duplicates stay together. "tail" holds out the bytes from `train_bytes` on.
    It cuts the document that holds this place, at a line break if there is one.
    """
    match config.split:
        case "hash":
            for document in found:
                is_valid = draw(document.data) < config.valid_fraction
                yield ("valid" if is_valid else "train"), document
        case "tail":
            for document in found:
                data = document.data
                cut = _cut_position(data, train_bytes)
                if cut > 0:
                    yield "train", document._replace(data=data[:cut])
                if cut < len(data):
                    yield "valid", document._replace(data=data[cut:])
                train_bytes -= len(data)
        case _:
            assert_never(config.split)


def require_both_splits(n_train: int, n_valid: int, config: DataConfig) -> None:
    """Raise InputError unless there are documents for training and for validation."""
    if n_train == n_valid == 0:
        raise InputError(f"data.path = {config.path}: no text; every document is empty or left out")
    for split, n_documents in (("train", n_train), ("valid", n_valid)):
        if n_documents == 0:
            raise InputError(
                f"the {split} split has no documents; change data.valid_fraction, set data.split: "
                "tail (for one or a few files), cut the text by data.separator, or add text"
            )


def _cut_position(data: bytes, wanted: int) -> int:
    """Return a place for a cut near byte `wanted`: after a line break, else after a character."""
    if wanted <= 0 or wanted >= len(data):
        return min(max(wanted, 0), len(data))
    after_line = data.find(b"\n", wanted) + 1
    if 0 < after_line < len(data):
        return after_line
    while wanted < len(data) and data[wanted] & 0xC0 == 0x80:  # inside a character
        wanted += 1
    return wanted
