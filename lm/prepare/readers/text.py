"""Plain text, and what formats made of lines share with it."""

from io import BufferedReader
from itertools import takewhile

from lm.prepare import limits
from lm.prepare.file_bytes import compression, opened
from lm.prepare.records import (
    LEAVE_OUT,
    WHOLE,
    Bad,
    Dropped,
    Found,
    Reader,
    Records,
    checked,
    too_long,
)
from lm.prepare.separators import next_record, split_at
from lm.prepare.signatures import JSON, MARK, json_kind, packed_kind


class Text(Reader):
    """Plain text: one record a file, or what lies between the separators."""

    what = "text"
    is_cut_by_separator = True
    name_mark = "#"  # before the number of a record

    def separator(self) -> bytes | None:
        """Return what stands between two records."""
        return self.options.separator

    def foreign(self, head: bytes) -> Bad | None:
        """Return the whole file as one bad record if its first bytes are not of this format."""
        packed = packed_kind(head, bool(compression(self.file)))
        if packed is not None:
            return Bad(WHOLE, "not text", f"{packed} {LEAVE_OUT}")
        wrong = self.wrong_json(head)
        return None if wrong is None else Bad(WHOLE, "raw JSON", f"{JSON[wrong]} {LEAVE_OUT}")

    def wrong_json(self, head: bytes) -> str | None:
        """Return the kind of JSON, a key of JSON, that is not for this format."""
        kind = json_kind(head)
        return kind if kind in ("lines", "array") else None

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
        return found if found[-1] < end else found[:-1] or [0]

    def read(self, start: int = 0, stop: int | None = None) -> Records:
        with opened(self.file, self.options.max_expansion) as stream:
            if start:  # what is compressed has one stretch, and no way back
                stream.seek(start)
            else:
                head = stream.peek(limits.HEAD_BYTES)[: limits.HEAD_BYTES]
                foreign = self.foreign(head)
                if foreign is not None:
                    yield foreign
                    return
                if head.startswith(MARK):
                    start = len(stream.read(len(MARK)))
                    yield Dropped("byte-order mark")
            yield from self.read_on(stream, start, stop)

    def read_on(self, stream: BufferedReader, start: int, stop: int | None) -> Records:
        """Return the records from where the stream of a file stands, its byte `start`."""
        separator = self.separator()
        if separator is None:
            # a large buffer stays a memory mapping of its own, whatever it is cut to
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
        """Return what lies between two separators as a record; None if there is none."""
        found = checked(offset, data, self.options, base=offset)
        if isinstance(found, Found):
            return found._replace(data=found.data.strip(b"\r\n"))  # they belong to the cut
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
