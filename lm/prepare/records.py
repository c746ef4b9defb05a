"""Readers and their records: the UTF-8 text of a document, or the reason why there is none."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lm.prepare import limits
from lm.prepare.file_bytes import chunks

WHOLE = -1  # the offset of a bad record that is the whole file
CONVERT = "convert the file to UTF-8, leave it out, or set data.encoding_errors: replace"
NAME_ANOTHER = "name another in data.text_field (or its source's text_field)"
SKIP = "or set data.on_bad_document: skip"
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class ReadOptions:
    """How to find the text in a file, and whether to replace bytes that are not text."""

    text_field: str  # the field of JSON objects, the column of tables
    separator: bytes | None  # cuts plain text into records; None: one file, one record
    replace: bool
    max_expansion: int  # a compressed file may hold this many times its size


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
    """A part of a file that belongs to no document; it is only counted."""

    reason: str


Records = Iterator[Found | Bad | Dropped]


class Reader(ABC):
    """A file of one format, read in stretches.

    A stretch begins with a record, and the stretches of a file give every record once. `start`,
    `stop` and offsets count in the unit of the format: bytes, rows, row groups or lines.
    """

    description: str  # of a file, with {} for data.text_field

    def __init__(self, file: Path, options: ReadOptions):
        self.file, self.options = file, options

    @abstractmethod
    def starts(self, size: int) -> list[int]:
        """Return the starts of stretches of about `size` bytes, the first 0."""

    @abstractmethod
    def read(self, start: int = 0, stop: int | None = None) -> Records:
        """Yield the records of the stretch from `start` to before `stop`."""

    def content(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Yield the bytes that decide the records of a stretch."""
        with open(self.file, "rb") as stream:
            stream.seek(start)
            yield from chunks(stream, None if stop is None else stop - start)

    def place(self, offset: int) -> str:
        """Return the place of the record at an offset, as a person looks it up."""
        return str(self.file) if offset == WHOLE else self.name(offset)

    @abstractmethod
    def name(self, offset: int) -> str:
        """Return the place of a record that is not the whole file."""


def checked(offset: int, data: bytes, options: ReadOptions, base: int | None = None) -> Found | Bad:
    """Return the bytes as a record if they are text; `base` is the offset of the first in the file.

    A NUL byte is UTF-8 but not text: it comes from UTF-16, a binary file, or a crash.
    """
    if len(data) > limits.MAX_DOCUMENT_BYTES:
        return too_long(offset)
    try:
        if not data.isascii():
            data.decode()
        bad, reason, what = data.find(0), "not text", "NUL, not text"
    except UnicodeDecodeError as error:
        bad, reason, what = error.start, "not UTF-8", "not UTF-8"
    if bad < 0:
        return Found(offset, data)
    if options.replace:
        made = data.decode("utf-8", "replace").replace("\0", "\ufffd").encode()
        mark = "\ufffd".encode()
        return Found(offset, made, made.count(mark) - data.count(mark))
    where = f"offset {bad} of the text" if base is None else f"offset {base + bad}"
    guess = " (is the file UTF-16?)" if base == bad == 0 and data.startswith(UTF_16_MARKS) else ""
    return Bad(offset, reason, f"byte 0x{data[bad]:02x} at {where} is {what}{guess}; {CONVERT}")


def too_long(offset: int) -> Bad:
    """Return the bad record for one that is longer than limits.MAX_DOCUMENT_BYTES."""
    limit = f"a document longer than {limits.MAX_DOCUMENT_BYTES >> 20} MiB"
    return Bad(offset, "too long", f"{limit}; split it (data.separator splits text files) {SKIP}")


def not_one(name: str, names: Sequence[str]) -> str | None:
    """Return an error message unless a table has exactly one column of this name."""
    if (count := names.count(name)) == 1:
        return None
    has = "" if count else f" (has: {', '.join(names)[:200]})"
    return f"{count or 'no'} column{'s' * (count > 1)} '{name}'{has}; {NAME_ANOTHER}"
