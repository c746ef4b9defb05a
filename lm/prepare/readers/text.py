"""Read plain text; the base class of the formats made of lines."""

from collections.abc import Container
from io import BufferedReader
from itertools import takewhile

from lm.prepare import limits
from lm.prepare.file_bytes import chunks, compression, next_record, opened, split_at
from lm.prepare.records import Bad, Dropped, Found, Reader, Records, checked, too_long
from lm.prepare.signatures import MARK, foreign


class Text(Reader):
    """Plain text: one record per file, or several between separators."""

    description = "text"
    is_plain = True  # data.separator ends a record
    name_mark = "#"  # before the number of a record
    wrong_json: Container[str | None] = ("lines", "array")  # see signatures.foreign

    def separator(self) -> bytes | None:
        """Return the bytes between two records."""
        return self.options.separator

    def foreign(self, head: bytes) -> Bad | None:
        """Return the whole file as one bad record if its first bytes contradict this format."""
        return foreign(head, bool(compression(self.file)), self.wrong_json)

    def holds(self, part: bytes) -> bool:
        """Return whether the file holds these bytes."""
        rest = b""
        with opened(self.file, self.options.max_expansion) as stream:
            for chunk in chunks(stream):
                rest += chunk
                if part in rest:
                    return True
                rest = rest[max(0, len(rest) - len(part) + 1) :]
        return False

    def starts(self, size: int) -> list[int]:
        separator = self.separator()
        found, end = [0], self.file.stat().st_size
        if compression(self.file) or separator is None or end <= size:
            return found
        with open(self.file, "rb") as stream:
            if self.foreign(stream.read(limits.HEAD_BYTES)) is not None:
                return found
            while (wanted := (found[-1] // size + 1) * size) < end:
                found.append(next_record(stream, separator, wanted))
        return found if found[-1] < end else found[:-1]

    def read(self, start: int = 0, stop: int | None = None) -> Records:
        with opened(self.file, self.options.max_expansion) as stream:
            if start:  # never in a compressed file: it has one stretch
                stream.seek(start)
            else:
                head = stream.peek(limits.HEAD_BYTES)[: limits.HEAD_BYTES]
                if (refused := self.foreign(head)) is not None:
                    yield refused
                    return
                if head.startswith(MARK):
                    start = len(stream.read(len(MARK)))
                    yield Dropped("byte-order mark")
            yield from self.read_on(stream, start, stop)

    def read_on(self, stream: BufferedReader, start: int, stop: int | None) -> Records:
        """Yield the records from here on; the stream is at byte `start` of the file."""
        separator = self.separator()
        if separator is None:
            # first try a small buffer: a large one stays a memory mapping, even when cut
            text = stream.read(limits.SEARCH_BYTES)
            if len(text) == limits.SEARCH_BYTES:
                text += stream.read(limits.MAX_DOCUMENT_BYTES + 1 - limits.SEARCH_BYTES)
            yield checked(0, text, self.options, base=start)
            return
        for offset, data in split_at(stream, separator, start, stop):
            record = too_long(offset) if data is None else self.record(offset, data)
            if record is not None:
                yield record

    def record(self, offset: int, data: bytes) -> Found | Bad | None:
        """Return the record between two separators, or None if there is none."""
        found = checked(offset, data, self.options, base=offset)
        if isinstance(found, Found):
            return found._replace(data=found.data.strip(b"\r\n"))  # they belong to the separator
        return found

    def name(self, offset: int) -> str:
        """Return the file and the number of the record, from 1."""
        separator = self.separator()
        if separator is None:
            return str(self.file)
        with opened(self.file, self.options.max_expansion) as stream:
            found = split_at(stream, separator, 0, None)
            number = sum(1 for _ in takewhile(lambda record: record[0] <= offset, found))
        return f"{self.file}{self.name_mark}{number}"


READERS = {"": Text}  # every suffix that no other file of this folder names
