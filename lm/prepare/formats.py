"""The formats of text files: a stretch of a file to its records, as bytes of UTF-8.

    file, start, stop --Format.read--> Found(offset, data) or Bad(offset, reason, message)

The suffix says what a file should be (FORMATS). Its first bytes can only contradict: then the file
is one bad record, so that nothing becomes text that a person would not call text.
A long file of lines, separated parts or rows can be read in stretches, by several processes:
`starts` says where they begin, each with a record, and together they give every record once.
Memory holds one chunk and one record, and no record is longer than MAX_DOCUMENT_BYTES.
"""

import csv
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BufferedIOBase, BufferedReader, RawIOBase, TextIOWrapper
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from lm.base.errors import InputError

CHUNK_BYTES = 1 << 22
SEARCH_BYTES = 1 << 16  # read at once where only the next separator is sought
MAX_DOCUMENT_BYTES = 1 << 26
ROWS = 1024  # of a table, at a time
HEAD_BYTES = 1 << 13  # decide whether a file is what its suffix says
WHOLE = -1  # the offset of a bad record that is the whole file
MARK = b"\xef\xbb\xbf"  # U+FEFF at the beginning of a file: says UTF-8, is no text
PACKED = (  # what a file is by the bytes at an offset, and what to do with it
    (0, b"PK\x03\x04", "a zip archive, not text; unpack it"),
    (257, b"ustar", "a tar archive, not text; unpack it"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive, not text; unpack it"),
    (0, b"Rar!\x1a\x07", "a rar archive, not text; unpack it"),
    (0, b"\x1f\x8b", "compressed by gzip, not text; name it .gz"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd, not text; name it .zst"),
    (0, b"\xfd7zXZ", "compressed by xz, not text; decompress it"),
    (4, b"1AY&SY", "compressed by bzip2, not text; decompress it"),
    (0, b"\x04\x22\x4d\x18", "compressed by lz4, not text; decompress it"),
    (0, b"PAR1\x15", "a parquet table, not text; name it .parquet"),
    (0, b"ARROW1\0\0", "an Arrow table, not text; save it as .parquet"),
    (0, b"\xff\xff\xff\xff", "an Arrow table, not text; save it as .parquet"),
    (0, b"SQLite format 3\0", "an SQLite database, not text; export its text"),
    (0, b"%PDF-", "a PDF, not text; convert it"),
    (0, b"\x89PNG", "a picture, not text; take it away"),
    (0, b"\xff\xd8\xff", "a picture, not text; take it away"),
    (0, b"GIF8", "a picture, not text; take it away"),
)
POINTERS = {  # what stands in the place of a file that git alone has not brought
    b"version https://git-lfs.github.com/spec/": ("Git LFS", "git lfs pull"),
    b"/annex/objects/": ("git-annex", "git annex get"),
}
JSON = {  # what JSON may be that is no line of an object each
    "lines": "JSON lines, not text; name it .jsonl",
    "array": "a JSON array; write an object a line (jq -c '.[]')",
    "value": "JSON over several lines, not an object a line; convert it (jq -c .)",
    "notebook": "a notebook; convert it (jupyter nbconvert --to script)",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
LEAVE_OUT = "or leave it out (data.glob, data.on_bad_document: skip)"
CONVERT = "convert the file, leave it out, or set data.encoding_errors: replace"


@dataclass(frozen=True)
class Layout:
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


class Text:
    """Plain text: one record a file, or what lies between the separators."""

    what = "text"  # becomes a document, with {} for data.text_field

    def separator(self, layout: Layout) -> bytes | None:
        """What stands between two records."""
        return layout.separator

    def foreign(self, file: Path, head: bytes) -> Bad | None:
        """The whole file as one bad record if its first bytes are not of this format."""
        for offset, signature, what in PACKED:
            if head.startswith(signature, offset):
                if compression(file) and what.startswith("compressed"):
                    what = "compressed twice, not text; decompress it"
                return Bad(WHOLE, "not text", f"{what} {LEAVE_OUT}")
        wrong = self.wrong_json(head)
        return None if wrong is None else Bad(WHOLE, "raw JSON", f"{JSON[wrong]} {LEAVE_OUT}")

    def wrong_json(self, head: bytes) -> str | None:
        """The kind of JSON, a key of JSON, that is not for this format."""
        kind = _json_kind(head)
        return kind if kind in ("lines", "array") else None

    def starts(self, file: Path, layout: Layout, size: int) -> list[int]:
        """Where stretches of about `size` bytes begin, each with a record; the first at 0."""
        separator = self.separator(layout)
        found, end = [0], file.stat().st_size
        if compression(file) or separator is None or end <= size:
            return found
        with open(file, "rb") as stream:
            if self.foreign(file, stream.read(HEAD_BYTES)) is not None:
                return found
            while (wanted := (found[-1] // size + 1) * size) < end:
                found.append(next_record(stream, separator, wanted))
        return found if found[-1] < end else found[:-1] or [0]

    def read(self, file: Path, layout: Layout, start: int = 0, stop: int | None = None) -> Records:
        """The records of the stretch from `start`; the next one starts at `stop`."""
        with opened(file, layout) as stream:
            if start:  # what is compressed has one stretch, and no way back
                stream.seek(start)
            else:
                head = stream.peek(HEAD_BYTES)[:HEAD_BYTES]
                foreign = self.foreign(file, head)
                if foreign is not None:
                    yield foreign
                    return
                if head.startswith(MARK):
                    start = len(stream.read(len(MARK)))
                    yield Dropped("byte-order mark")
            yield from self.read_on(file, stream, layout, start, stop)

    def read_on(
        self, file: Path, stream: BufferedReader, layout: Layout, start: int, stop: int | None
    ) -> Records:
        """The records from where the stream of a file stands, its byte `start`."""
        separator = self.separator(layout)
        if separator is None:
            # a large buffer stays a memory mapping of its own, whatever it is cut to
            text = stream.read(SEARCH_BYTES)
            if len(text) == SEARCH_BYTES:
                text += stream.read(MAX_DOCUMENT_BYTES + 1 - SEARCH_BYTES)
            yield checked(0, text, layout, base=start)
            return
        for offset, data in records(stream, separator, start, stop):
            record = _too_long(offset) if data is None else self.record(offset, data, layout)
            if record is not None:
                yield record

    def content(
        self, file: Path, layout: Layout, start: int = 0, stop: int | None = None
    ) -> Iterator[bytes]:
        """The bytes of the file that decide the records of a stretch."""
        with open(file, "rb") as stream:
            stream.seek(start)
            yield from _chunks(stream, None if stop is None else stop - start)

    def record(self, offset: int, data: bytes, layout: Layout) -> Found | Bad | None:
        """What lies between two separators as a record; None if there is none."""
        found = checked(offset, data, layout, base=offset)
        if isinstance(found, Found):
            return found._replace(data=found.data.strip(b"\r\n"))  # they belong to the cut
        return found

    def name(self, file: Path, layout: Layout, offset: int) -> str:
        """The record at an offset, in words that help to find it."""
        if layout.separator is None:
            return str(file)
        return f"{file}#{self.number(file, layout, offset)}"

    def number(self, file: Path, layout: Layout, offset: int) -> int:
        """How many records begin at or before an offset."""
        separator = self.separator(layout)
        assert separator is not None
        with opened(file, layout) as stream:
            before = takewhile(lambda r: r[0] <= offset, records(stream, separator, 0, None))
            return sum(1 for _ in before)


class JsonLines(Text):
    """One JSON object a line, the text in one of its fields."""

    what = "JSON lines, field {}"

    def wrong_json(self, head: bytes) -> str | None:
        return None  # each line is judged

    def separator(self, layout: Layout) -> bytes:
        return b"\n"

    def record(self, offset: int, data: bytes, layout: Layout) -> Found | Bad | None:
        if not data or data.isspace():
            return None
        try:
            text = orjson.loads(data)[layout.text_field]
        except (ValueError, LookupError, TypeError):
            text = None
        if isinstance(text, str):
            return checked(offset, text.encode(), layout)
        return _unusual_line(offset, data, layout)

    def name(self, file: Path, layout: Layout, offset: int) -> str:
        return f"{file}:{self.number(file, layout, offset)}"


class Json(JsonLines):
    """JSON lines, unless the content is one value over several lines."""

    def wrong_json(self, head: bytes) -> str | None:
        kind = _json_kind(head)
        return kind if kind in ("array", "value") else None


class Notebook(Text):
    """Code and prose in JSON: one bad record."""

    what = "no text: notebook"

    def wrong_json(self, head: bytes) -> str | None:
        return "notebook"


class CommaSeparated(Text):
    """A table whose first line names the columns, the text in one of them."""

    what = "table, column {}"
    delimiter = ","

    def wrong_json(self, head: bytes) -> str | None:
        return None

    def starts(self, file: Path, layout: Layout, size: int) -> list[int]:
        """One stretch: which line breaks end a row is only known from the beginning."""
        return [0]

    def read_on(
        self, file: Path, stream: BufferedReader, layout: Layout, start: int, stop: int | None
    ) -> Records:
        """The rows below the names; the offset of each is its first line, from 1."""
        csv.field_size_limit(MAX_DOCUMENT_BYTES)
        with TextIOWrapper(stream, "utf-8", "surrogateescape", newline="") as lines:  # bytes as is
            short = _ShortRows(lines)
            rows = csv.reader(short, delimiter=self.delimiter, strict=True)
            line = 1
            try:
                names = next(rows, [])
                problem = _not_one(layout.text_field, names)
                if problem is not None:
                    yield Bad(WHOLE, "no text", f"{problem}; name one in data.text_field")
                    return
                column, line = names.index(layout.text_field), rows.line_num + 1
                short.held = 0
                for row in rows:
                    short.held = 0
                    if len(row) == len(names):
                        yield checked(line, row[column].encode("utf-8", "surrogateescape"), layout)
                    elif row:
                        lengths = f"length {len(row)}, the first has length {len(names)}"
                        yield Bad(line, "no text", f"a row of {lengths}")
                    line = rows.line_num + 1
            except csv.Error as error:
                raise InputError(f"{file}:{line}: not a row of a table ({error})") from None

    def name(self, file: Path, layout: Layout, offset: int) -> str:
        return f"{file}:{offset}"


class TabSeparated(CommaSeparated):
    """The same with tabs."""

    delimiter = "\t"


class Parquet:
    """A table, the text in one of its columns; its stretches begin at row groups."""

    what = "table, column {}"

    def starts(self, file: Path, layout: Layout, size: int) -> list[int]:
        """The row groups at which stretches of about `size` bytes of text begin."""
        if compression(file):
            return [0]
        with _table(file, layout) as table:
            column = _column(file, table, layout.text_field)
            groups = (table.metadata.row_group(i) for i in range(table.num_row_groups))
            sizes = [group.column(column).total_uncompressed_size for group in groups]
        stretch = np.cumsum([0, *sizes])[:-1] // size
        return [0, *(np.flatnonzero(np.diff(stretch)) + 1).tolist()]

    def read(self, file: Path, layout: Layout, start: int = 0, stop: int | None = None) -> Records:
        """The rows of the row groups from `start` to before `stop`."""
        with _table(file, layout) as table:
            number = _column(file, table, layout.text_field)
            groups = range(table.num_row_groups)
            row = sum(table.metadata.row_group(i).num_rows for i in groups[:start])
            columns = (table.metadata.row_group(i).column(number) for i in groups[start:stop])
            size, made = sum(column.total_compressed_size for column in columns), 0
            for data in _values(table, number, layout.text_field, groups[start:stop]):
                if data is None:
                    yield Bad(row, "no text", f"column '{layout.text_field}' is null")
                else:
                    made += len(data)
                    _refuse_expansion(file, size, made, layout.max_expansion)
                    yield checked(row, data, layout)
                row += 1

    def content(
        self, file: Path, layout: Layout, start: int = 0, stop: int | None = None
    ) -> Iterator[bytes]:
        """How the column is stored in these row groups, and its pages."""
        if compression(file):
            yield from PLAIN.content(file, layout)
            return
        with _table(file, layout) as table, open(file, "rb") as stream:
            number = _column(file, table, layout.text_field)
            for i in range(table.num_row_groups)[start:stop]:
                column = table.metadata.row_group(i).column(number)
                stored = (column.physical_type, column.compression, column.num_values)
                yield repr((stored, table.schema.column(number).max_definition_level)).encode()
                first = column.dictionary_page_offset or column.data_page_offset
                stream.seek(min(first, column.data_page_offset))
                yield from _chunks(stream, column.total_compressed_size)

    def name(self, file: Path, layout: Layout, offset: int) -> str:
        """A row, counted from 0."""
        return f"{file}: row {offset}"


PLAIN = Text()  # every other suffix
LINES = JsonLines()
FORMATS: dict[str, Text | Parquet] = {
    ".jsonl": LINES,
    ".jsonlines": LINES,
    ".ndjson": LINES,
    ".json": Json(),
    ".ipynb": Notebook(),
    ".csv": CommaSeparated(),
    ".tsv": TabSeparated(),
    ".parquet": Parquet(),
}


def compression(file: Path) -> str | None:
    """How a file is compressed, by its suffix."""
    return COMPRESSIONS.get(file.suffix.lower())


def suffix_of(file: Path) -> str:
    """The suffix that says what a file is, in small letters; with .gz or .zst behind, both."""
    packed = file.suffix if compression(file) else ""
    return (Path(file.stem).suffix + packed if packed else file.suffix).lower()


def format_of(file: Path) -> Text | Parquet:
    """What a file's suffix says, or the one before .gz or .zst."""
    inner = file.stem if compression(file) else file.name
    return FORMATS.get(Path(inner).suffix.lower(), PLAIN)


def checked(offset: int, data: bytes, layout: Layout, base: int | None = None) -> Found | Bad:
    """A record if its bytes are text; `base` says where in the file they begin.

    A NUL byte is UTF-8 but no text: it marks UTF-16, a binary file, or zeros after a crash.
    """
    if len(data) > MAX_DOCUMENT_BYTES:
        return _too_long(offset)
    try:
        if not data.isascii():
            data.decode()
        bad, what = data.find(0), "not text"
    except UnicodeDecodeError as error:
        bad, what = error.start, "not UTF-8"
    if bad < 0:
        return Found(offset, data)
    if layout.replace:
        return Found(offset, *_replaced(data))
    where = f"offset {bad} of its text" if base is None else f"offset {base + bad}"
    return Bad(offset, what, f"byte 0x{data[bad]:02x} at {where} is {what}; {CONVERT}")


class _ShortRows:
    """Lines for a reader of rows, so that memory holds no row that is longer than a document."""

    def __init__(self, lines: TextIOWrapper):
        self.lines, self.held = lines, 0  # characters of the row that is being read

    def __iter__(self) -> "_ShortRows":
        return self

    def __next__(self) -> str:
        line = self.lines.readline(MAX_DOCUMENT_BYTES + 1)
        self.held += len(line)
        if self.held > MAX_DOCUMENT_BYTES:
            raise csv.Error(f"a row longer than {MAX_DOCUMENT_BYTES >> 20} MiB")
        if not line:
            raise StopIteration
        return line


def _json_kind(head: bytes) -> str | None:
    """What the first bytes of a file begin: JSON lines, an array of objects, another object."""
    text = head.removeprefix(MARK).lstrip()
    if re.match(rb'\[\s*\{\s*"', text):
        return "array"
    if not text.startswith(b"{"):
        return None
    line, line_break, _ = text.partition(b"\n")
    try:
        return "lines" if isinstance(orjson.loads(line), dict) and line.strip() != b"{}" else None
    except ValueError:  # a line that is longer than the head may be JSON
        is_long = not line_break and re.match(rb'\{\s*"[^"]*"\s*:', text)
        return "lines" if is_long else "value"


def _not_one(name: str, names: Sequence[str]) -> str | None:
    """What is wrong if a table has not one column of this name."""
    count = names.count(name)
    if count == 0:
        return f"no column '{name}' (has: {', '.join(names)[:200]})"
    return f"{count} columns '{name}'" if count > 1 else None


def _replaced(data: bytes) -> tuple[bytes, int]:
    """Bytes with U+FFFD in place of what is no text, and how many were put in."""
    made = data.decode("utf-8", "replace").replace("\0", "\ufffd").encode()
    return made, made.count(b"\xef\xbf\xbd") - data.count(b"\xef\xbf\xbd")


def _too_long(offset: int) -> Bad:
    remedy = "cut it into several, by data.separator or, in a .jsonl file, by lines"
    limit = f"a document longer than {MAX_DOCUMENT_BYTES >> 20} MiB"
    return Bad(offset, "too long", f"{limit}; {remedy}")


def _unusual_line(offset: int, data: bytes, layout: Layout) -> Found | Bad:
    """A line in which no text was found at first sight: what the standard library makes of it."""
    line = checked(offset, data, layout, base=offset)
    if isinstance(line, Bad):
        return line
    field = layout.text_field
    try:
        record = json.loads(line.data)
    except (ValueError, RecursionError) as error:
        return Bad(offset, "not JSON", f"not valid JSON ({error})")
    if not isinstance(record, dict):
        return Bad(offset, "no text", f"not an object with a field '{field}'")
    if field not in record:
        return Bad(offset, "no text", f"no field '{field}' (has: {', '.join(record)[:200]})")
    if not isinstance(record[field], str):
        return Bad(offset, "no text", f"field '{field}' is not text; name one in data.text_field")
    # JSON can spell half a surrogate pair; its bytes are not UTF-8
    found = checked(offset, record[field].encode("utf-8", "surrogatepass"), layout)
    return (
        found if isinstance(found, Bad) else found._replace(replaced=found.replaced + line.replaced)
    )


# --- lines and parts --------------------------------------------------------------------


def records(
    stream: BufferedIOBase, separator: bytes, start: int, end: int | None
) -> Iterator[tuple[int, bytes | None]]:
    """What lies between the separators from here on, with offsets that begin with `start`.

    `end` is where a record begins that is not wanted any more. None stands for a record that
    is too long, which memory does not hold.
    """
    offset, rest, dropped = start, b"", 0
    for chunk in _chunks(stream, None if end is None else end - start):
        *whole, rest = (rest + chunk).split(separator)
        for part in whole:
            size = dropped + len(part)
            yield offset, part if size <= MAX_DOCUMENT_BYTES else None
            offset, dropped = offset + size + len(separator), 0
        surplus = len(rest) - len(separator) + 1  # the last bytes may begin a separator
        if dropped + surplus > MAX_DOCUMENT_BYTES:
            dropped, rest = dropped + surplus, rest[surplus:]
    if rest or dropped:
        yield offset, rest if dropped + len(rest) <= MAX_DOCUMENT_BYTES else None


def holds(file: Path, layout: Layout, part: bytes) -> bool:
    """Whether some bytes stand anywhere in a file of text."""
    rest = b""
    with opened(file, layout) as stream:
        for chunk in _chunks(stream):
            rest += chunk
            if part in rest:
                return True
            rest = rest[max(0, len(rest) - len(part) + 1) :]
    return False


def _chunks(stream: BufferedIOBase, size: int | None = None) -> Iterator[bytes]:
    """The next bytes of a stream, so many or all."""
    left = float("inf") if size is None else size
    at_once = min(SEARCH_BYTES, CHUNK_BYTES)  # most files end here: a longer buffer is mapped
    while chunk := stream.read(int(min(at_once, left))):
        left -= len(chunk)
        at_once = CHUNK_BYTES
        yield chunk


def next_record(stream: BufferedIOBase, separator: bytes, position: int) -> int:
    """The first byte from `position` on where a record begins for sure, or the file's end.

    Whoever reads from the start of the file finds this separator, too: none overlaps it from the
    left, as the second of three line breaks overlaps where two of them separate.
    """
    size = len(separator)
    base = max(0, position - 2 * size + 1)  # where the buffer begins
    stream.seek(base)
    buffer, place = b"", max(0, position - size) - base
    while chunk := stream.read(SEARCH_BYTES):
        buffer += chunk
        while (found := buffer.find(separator, place)) >= 0:
            if buffer.find(separator, max(0, found - size + 1), found + size - 1) < 0:
                return base + found + size
            place = found + 1
        surplus = max(0, len(buffer) - 2 * size + 2)
        place = max(place, len(buffer) - size + 1) - surplus
        base, buffer = base + surplus, buffer[surplus:]
    return stream.tell()


def opened(file: Path, layout: Layout) -> BufferedReader:
    """A file of text as a stream, decompressed if its suffix says so.

    Raises InputError if the file is not here.
    """
    raw: Any = _Decompressed(file, layout) if compression(file) else open(file, "rb", 0)  # noqa: SIM115
    stream = BufferedReader(raw)
    if not compression(file):
        _refuse_pointer(file, stream.peek(HEAD_BYTES))
    return stream


def _refuse_pointer(file: Path, head: bytes | None = None) -> None:
    """Raise InputError if what stands here is not the file but says where it is."""
    if head is None:
        with open(file, "rb") as stream:
            head = stream.read(HEAD_BYTES)
    for signature, (tool, command) in POINTERS.items():
        if head.startswith(signature):
            raise InputError(f"{file}: a pointer of {tool}, not the file itself; run `{command}`")


class _Decompressed(RawIOBase):
    """The content of a .gz or .zst file, its checksums verified; can be read once."""

    def __init__(self, file: Path, layout: Layout):
        import pyarrow  # takes 0.1 s: only where it is needed

        _refuse_pointer(file)
        self.file, self.size, self.made = file, file.stat().st_size, 0
        self.max_expansion = layout.max_expansion
        raw = open(file, "rb")  # noqa: SIM115 - pyarrow closes it; by name it opens UTF-8 alone
        self.stream = pyarrow.input_stream(raw, compression=compression(file))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self.stream.read(len(buffer))
        except OSError as error:
            if "requires too much memory" in str(error):  # the words of zstd
                raise InputError(
                    f"{self.file}: compressed with a window longer than 128 MiB; unpack it "
                    f"(zstd -d --long=31)"
                ) from None
            raise InputError(f"{self.file}: damaged or cut off ({error})") from None
        self.made += len(data)
        _refuse_expansion(self.file, self.size, self.made, self.max_expansion)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.stream.close()
        super().close()


def _refuse_expansion(file: Path, size: int, expanded: int, limit: int) -> None:
    if expanded > max(MAX_DOCUMENT_BYTES, size * limit):
        raise InputError(
            f"{file}: {size:,} bytes expand to {limit} times as many or more; raise "
            "data.max_expansion if that is right"
        )


# --- tables -----------------------------------------------------------------------------


@contextmanager
def _table(file: Path, layout: Layout) -> Iterator[Any]:
    """A parquet file, opened; a compressed one is unpacked into a temporary file first."""
    import pyarrow
    from pyarrow.parquet import ParquetFile, read_metadata

    with ExitStack() as stack:
        if compression(file):
            source: Any = stack.enter_context(tempfile.TemporaryFile())
            unpacked = stack.enter_context(_Decompressed(file, layout))
            shutil.copyfileobj(unpacked, source, CHUNK_BYTES)
        else:
            _refuse_pointer(file)
            source = stack.enter_context(open(file, "rb"))
        try:
            # buffered: a row group is not read as a whole
            metadata = read_metadata(source)
            table = ParquetFile(
                source,
                metadata=metadata,
                buffer_size=1 << 20,
                pre_buffer=False,
                page_checksum_verification=True,
                read_dictionary=_shared(metadata, layout.text_field),
            )
            yield stack.enter_context(table)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = str(error).split("\n")[0]
            raise InputError(f"{file}: damaged or no parquet table ({reason})") from None


def _shared(metadata: Any, name: str) -> list[str]:
    """The column, in a list, if its rows hold numbers of values that are stored once.

    Decoded, a thousand rows of one long value would take a thousand times its memory. Where most
    values are stored one by one, to look for equal ones takes four times as long.
    """
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    if name not in paths:
        return []
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    columns = [group.column(paths.index(name)) for group in groups]
    stored = [c.total_compressed_size for c in columns]
    values = [
        c.data_page_offset - (c.dictionary_page_offset or c.data_page_offset) for c in columns
    ]
    numbers_alone = sum(stored) - sum(values) <= sum(8 * c.num_values + 1024 for c in columns)
    return [name] if numbers_alone else []


def _column(file: Path, table: Any, name: str) -> int:
    """The number of a column of text among the columns that are stored."""
    from pyarrow import types

    schema = table.schema_arrow
    problem = _not_one(name, schema.names)
    if problem is not None:
        raise InputError(f"{file}: {problem}; name one in data.text_field")
    kind = schema.field(name).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    is_text = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    if not any(test(kind) for test in (*is_text, types.is_string_view, types.is_binary_view)):
        raise InputError(
            f"{file}: column '{name}' is {kind}, not text; name one in data.text_field"
        )
    stored = [table.schema.column(i).path for i in range(len(table.schema))]
    problem = _not_one(name, stored)  # the field b of a column a has the path of a column "a.b"
    if problem is not None:
        raise InputError(f"{file}: {problem}; name one in data.text_field")
    return stored.index(name)


def _values(table: Any, number: int, name: str, groups: Sequence[int]) -> Iterator[bytes | None]:
    """The values of a column in some row groups, about CHUNK_BYTES of them in memory."""
    for i in groups:
        group = table.metadata.row_group(i)
        size = group.column(number).total_uncompressed_size
        rows = min(ROWS, 1 + CHUNK_BYTES * group.num_rows // max(1, size))
        for batch in table.iter_batches(rows, [i], columns=[name], use_threads=False):
            yield from _column_bytes(batch.column(0))


def _column_bytes(column: Any) -> Iterator[bytes | None]:
    """The values of an Arrow array of text, None for a null, without a str in between."""
    import pyarrow

    array, places = column, np.arange(len(column))
    if pyarrow.types.is_dictionary(column.type):
        array, places = column.dictionary, column.indices.fill_null(0).to_numpy()
    array = array.cast(pyarrow.large_binary())
    _, offsets, data = array.buffers()
    ends = np.frombuffer(offsets or bytes(8), dtype=np.int64)[array.offset :]
    view = memoryview(data) if data is not None else memoryview(b"")
    is_valid = column.is_valid().to_numpy(zero_copy_only=False)
    for place, valid in zip(places.tolist(), is_valid, strict=True):
        yield bytes(view[ends[place] : ends[place + 1]]) if valid else None
