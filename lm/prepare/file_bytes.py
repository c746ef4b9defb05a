"""Read the bytes of a file, decompressed if its suffix says so, and cut them at separators.

Memory holds one chunk and one record.
"""

import sys
from collections.abc import Iterator
from io import BufferedIOBase, BufferedReader, RawIOBase
from pathlib import Path
from typing import Any

from lm.base.errors import InputError
from lm.prepare import limits

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
POINTERS = {  # first bytes of the small files that git keeps in place of large ones
    b"version https://git-lfs.github.com/spec/": ("Git LFS", "git lfs pull"),
    b"/annex/objects/": ("git-annex", "git annex get"),
}


def compression(file: Path) -> str | None:
    """Return the compression of a file, by its suffix."""
    return COMPRESSIONS.get(file.suffix.lower())


def opened(file: Path, max_expansion: int) -> BufferedReader:
    """Open a file of text as a stream, decompressed if its suffix says so.

    Raises InputError if it is a pointer to a file that is not here.
    """
    raw: Any = Decompressed(file, max_expansion) if compression(file) else open(file, "rb", 0)  # noqa: SIM115
    stream = BufferedReader(raw)
    if not compression(file):
        refuse_pointer(file, stream.peek(limits.HEAD_BYTES))
    return stream


def chunks(stream: BufferedIOBase, size: int | None = None) -> Iterator[bytes]:
    """Yield the next `size` bytes of a stream, or all, in chunks."""
    left = sys.maxsize if size is None else size
    # most files end in the first chunk: a large buffer for them would be a memory mapping
    at_once = min(limits.SEARCH_BYTES, limits.CHUNK_BYTES)
    while chunk := stream.read(min(at_once, left)):
        left -= len(chunk)
        at_once = limits.CHUNK_BYTES
        yield chunk


def split_at(
    stream: BufferedIOBase, separator: bytes, start: int, end: int | None
) -> Iterator[tuple[int, bytes | None]]:
    """Yield offset and bytes of the records from here on, which is offset `start`, to before `end`.

    The bytes of a record that is too long are None, since memory does not hold them.
    """
    offset, rest, dropped = start, b"", 0
    for chunk in chunks(stream, None if end is None else end - start):
        *whole, rest = (rest + chunk).split(separator)
        for part in whole:
            size = dropped + len(part)
            yield offset, part if size <= limits.MAX_DOCUMENT_BYTES else None
            offset, dropped = offset + size + len(separator), 0
        surplus = len(rest) - len(separator) + 1  # the last bytes may begin a separator
        if dropped + surplus > limits.MAX_DOCUMENT_BYTES:
            dropped, rest = dropped + surplus, rest[surplus:]
    if rest or dropped:
        yield offset, rest if dropped + len(rest) <= limits.MAX_DOCUMENT_BYTES else None


def next_record(stream: BufferedIOBase, separator: bytes, position: int) -> int:
    """Return the first place from `position` on where a record surely begins, or the file's end.

    The separator before it overlaps no other on its left, as in three line breaks where two
    separate. So a reader from the start of the file finds it, too.
    """
    size = len(separator)
    base = max(0, position - 2 * size + 1)  # where the buffer begins
    stream.seek(base)
    buffer, place = b"", max(0, position - size) - base
    while chunk := stream.read(limits.SEARCH_BYTES):
        buffer += chunk
        while (found := buffer.find(separator, place)) >= 0:
            if buffer.find(separator, max(0, found - size + 1), found + size - 1) < 0:
                return base + found + size
            place = found + 1
        surplus = max(0, len(buffer) - 2 * size + 2)
        place = max(place, len(buffer) - size + 1) - surplus
        base, buffer = base + surplus, buffer[surplus:]
    return stream.tell()


class Decompressed(RawIOBase):
    """The content of a compressed file, its checksums verified; can be read once."""

    def __init__(self, file: Path, max_expansion: int):
        import pyarrow  # takes 0.1 s: only where it is needed

        refuse_pointer(file)
        self.file, self.size, self.made = file, file.stat().st_size, 0
        self.max_expansion = max_expansion
        raw = open(file, "rb")  # noqa: SIM115 - pyarrow closes it; by name it opens UTF-8 alone
        self.stream = pyarrow.input_stream(raw, compression=compression(file))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self.stream.read(len(buffer))
        except OSError as error:
            problem = f"damaged or cut off ({error}); fetch or compress it again"
            if "requires too much memory" in str(error):  # zstd's message
                problem = "compressed with a window above 128 MiB; unpack it (zstd -d --long=31)"
            raise InputError(f"{self.file}: {problem}") from None
        self.made += len(data)
        refuse_expansion(self.file, self.size, self.made, self.max_expansion)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.stream.close()
        super().close()


def refuse_pointer(file: Path, head: bytes | None = None) -> None:
    """Raise InputError if the file is a pointer of git to the file itself."""
    if head is None:
        with open(file, "rb") as stream:
            head = stream.read(limits.HEAD_BYTES)
    for signature, (tool, command) in POINTERS.items():
        if head.startswith(signature):
            raise InputError(f"{file}: a pointer of {tool}, not the file itself; run `{command}`")


def refuse_expansion(file: Path, size: int, expanded: int, limit: int) -> None:
    """Raise InputError if a file of `size` bytes holds more than `limit` times as many."""
    if expanded > max(limits.MAX_DOCUMENT_BYTES, size * limit):
        raise InputError(
            f"{file}: {size:,} bytes expand to more than {limit} times as many; raise "
            "data.max_expansion if the file is right"
        )
