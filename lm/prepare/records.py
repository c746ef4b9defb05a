"""Readers and their records: the UTF-8 text of a document, or the reason why there is none."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lm.prepare import limits
from lm.prepare.file_bytes import chunks

WHOLE = -1  # the offset of a bad record that is the whole file
CONVERT = "convert the file, leave it out, or set data.encoding_errors: replace"


@dataclass(frozen=True)
class ReadOptions:
    """Where in a file the text stands, and whether bytes that are not text are replaced."""

    text_field: str  # of JSON objects; the column of tables
    separator: bytes | None  # cuts plain text into records; None: one file, one record
    replace: bool
    max_expansion: int  # times its size that a compressed file may hold


class Found(NamedTuple):
    """A record with text. `offset` is its first byte in the file, its row or its line."""

    offset: int
    data: bytes
    replaced: int = 0  # characters put in place of bytes that are not text


class Bad(NamedTuple):
    """A record without text: the reason, as it is counted, and a message."""

    offset: int
    reason: str
    message: str


class Dropped(NamedTuple):
    """A part of a file that belongs to no document and is only counted."""

    reason: str


Records = Iterator[Found | Bad | Dropped]


class Reader(ABC):
    """A file of one format, read in stretches.

    A stretch begins with a record, and the stretches of a file give every record once. The unit of
    `start`, `stop` and offsets is the format's own: bytes, rows or lines.
    """

    description: str  # of its records, with {} for data.text_field

    def __init__(self, file: Path, options: ReadOptions):
        self.file, self.options = file, options

    @abstractmethod
    def starts(self, size: int) -> list[int]:
        """Return where stretches of about `size` bytes begin, the first at 0."""

    @abstractmethod
    def read(self, start: int = 0, stop: int | None = None) -> Records:
        """Yield the records of the stretch from `start` to before `stop`."""

    def content(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Yield the bytes of the file that decide the records of a stretch."""
        with open(self.file, "rb") as stream:
            stream.seek(start)
            yield from chunks(stream, None if stop is None else stop - start)

    def place(self, offset: int) -> str:
        """Return the place of the record at an offset, in words that help to find it."""
        return str(self.file) if offset == WHOLE else self.name(offset)

    @abstractmethod
    def name(self, offset: int) -> str:
        """Return the same for a record that is not the whole file."""


def checked(offset: int, data: bytes, options: ReadOptions, base: int | None = None) -> Found | Bad:
    """Return a record if its bytes are text; `base` is the place of the first in the file.

    A NUL byte is UTF-8 but no text: it comes from UTF-16, a binary file, or a crash.
    """
    if len(data) > limits.MAX_DOCUMENT_BYTES:
        return too_long(offset)
    try:
        if not data.isascii():
            data.decode()
        bad, what = data.find(0), "not text"
    except UnicodeDecodeError as error:
        bad, what = error.start, "not UTF-8"
    if bad < 0:
        return Found(offset, data)
    if options.replace:
        made = data.decode("utf-8", "replace").replace("\0", "\ufffd").encode()
        mark = "\ufffd".encode()
        return Found(offset, made, made.count(mark) - data.count(mark))
    where = f"offset {bad} of its text" if base is None else f"offset {base + bad}"
    return Bad(offset, what, f"byte 0x{data[bad]:02x} at {where} is {what}; {CONVERT}")


def too_long(offset: int) -> Bad:
    """Return a record that is longer than limits.MAX_DOCUMENT_BYTES."""
    limit = f"a document longer than {limits.MAX_DOCUMENT_BYTES >> 20} MiB"
    remedy = "cut it into several, by data.separator or, in a .jsonl file, by lines"
    return Bad(offset, "too long", f"{limit}; {remedy}")


def not_one(name: str, names: Sequence[str]) -> str | None:
    """Return an error message unless a table has exactly one column of this name."""
    if (count := names.count(name)) == 1:
        return None
    problem = f"{count} columns" if count else "no column"
    has = "" if count else f" (has: {', '.join(names)[:200]})"
    return f"{problem} '{name}'{has}; name one in data.text_field"
