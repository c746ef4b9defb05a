"""What lies between the separators of a stream, found with one chunk and one record in memory."""

from collections.abc import Iterator
from io import BufferedIOBase

from lm.prepare import limits
from lm.prepare.file_bytes import chunks


def split_at(
    stream: BufferedIOBase, separator: bytes, start: int, end: int | None
) -> Iterator[tuple[int, bytes | None]]:
    """Return what lies between the separators from here on, with offsets from `start`.

    `end` is where a record begins that is not wanted any more. None stands for a record that
    is too long, which memory does not hold.
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
    """Return the first byte from `position` on where a record begins for sure, or the file's end.

    Whoever reads from the start of the file finds this separator, too: none overlaps it from the
    left, as the second of three line breaks overlaps where two of them separate.
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


def holds(stream: BufferedIOBase, part: bytes) -> bool:
    """Return whether some bytes stand anywhere in a stream."""
    rest = b""
    for chunk in chunks(stream):
        rest += chunk
        if part in rest:
            return True
        rest = rest[max(0, len(rest) - len(part) + 1) :]
    return False
