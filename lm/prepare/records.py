"""What readers give: records, each the UTF-8 text of a document or the reason why it has none."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lm.prepare import limits
from lm.prepare.file_bytes import chunks

WHOLE = -1  # the offset of a bad record that is the whole file
LEAVE_OUT = "or leave it out (data.glob, data.on_bad_document: skip)"
CONVERT = "convert the file, leave it out, or set data.encoding_errors: replace"


@dataclass(frozen=True)
class ReadOptions:
    """Where in a file the text stands, and whether bytes that are no text are replaced."""

    text_field: str  # of JSON objects; the column of tables
    separator: bytes | None  # cuts plain text into records; None: one file, one record
    replace: bool
    max_expansion: int  # times its size that a compressed file may hold


class Found(NamedTuple):
    """A record's text. It begins at this byte of the file, or is this row."""

    offset: int
    data: bytes
    replaced: int = 0  # characters put in place of what is not UTF-8


class Bad(NamedTuple):
    """A record without text: why, in words to count by, and in a message."""

    offset: int
    reason: str
    message: str


class Dropped(NamedTuple):
    """What is no part of the text and no document either: it is counted."""

    reason: str


Records = Iterator[Found | Bad | Dropped]


class Reader(ABC):
    """A file of one format: a stretch of it to its records.

    A stretch begins with a record, and the stretches of a file give every record once. What
    `start`, `stop` and offsets count is the format's own: bytes, rows or lines.
    """

    what: str  # becomes a document, with {} for data.text_field
    is_cut_by_separator = False  # data.separator says where a record ends

    def __init__(self, file: Path, options: ReadOptions):
        self.file, self.options = file, options

    @abstractmethod
    def starts(self, size: int) -> list[int]:
        """Return where stretches of about `size` bytes begin, the first at 0."""

    @abstractmethod
    def read(self, start: int = 0, stop: int | None = None) -> Records:
        """Return the records of the stretch from `start`; the next one starts at `stop`."""

    def content(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Return the bytes of the file that decide the records of a stretch."""
        with open(self.file, "rb") as stream:
            stream.seek(start)
            yield from chunks(stream, None if stop is None else stop - start)

    @abstractmethod
    def name(self, offset: int) -> str:
        """Return the record at an offset in words that help to find it."""


def checked(offset: int, data: bytes, options: ReadOptions, base: int | None = None) -> Found | Bad:
    """Return a record if its bytes are text; `base` says where in the file they begin.

    A NUL byte is UTF-8 but no text: it marks UTF-16, a binary file, or zeros after a crash.
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
        return Found(offset, *_replaced(data))
    where = f"offset {bad} of its text" if base is None else f"offset {base + bad}"
    return Bad(offset, what, f"byte 0x{data[bad]:02x} at {where} is {what}; {CONVERT}")


def _replaced(data: bytes) -> tuple[bytes, int]:
    """Return bytes with U+FFFD in place of what is no text, and how many were put in."""
    made = data.decode("utf-8", "replace").replace("\0", "\ufffd").encode()
    return made, made.count(b"\xef\xbf\xbd") - data.count(b"\xef\xbf\xbd")


def too_long(offset: int) -> Bad:
    """Return the record that memory does not hold."""
    remedy = "cut it into several, by data.separator or, in a .jsonl file, by lines"
    limit = f"a document longer than {limits.MAX_DOCUMENT_BYTES >> 20} MiB"
    return Bad(offset, "too long", f"{limit}; {remedy}")


def not_one(name: str, names: Sequence[str]) -> str | None:
    """Return what is wrong if a table has not one column of this name."""
    count = names.count(name)
    if count == 0:
        return f"no column '{name}' (has: {', '.join(names)[:200]})"
    return f"{count} columns '{name}'" if count > 1 else None
