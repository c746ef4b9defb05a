"""Tables as text: comma-separated and tab-separated values."""

import csv
from io import BufferedReader, TextIOWrapper

from lm.base.errors import InputError
from lm.prepare import limits
from lm.prepare.readers.text import Text
from lm.prepare.records import WHOLE, Bad, Records, checked, not_one


class CommaSeparated(Text):
    """A table whose first line names the columns, the text in one of them."""

    what = "table, column {}"
    is_cut_by_separator = False
    delimiter = ","

    def wrong_json(self, head: bytes) -> str | None:
        return None

    def starts(self, size: int) -> list[int]:
        return [0]  # which line breaks end a row is only known from the beginning

    def read_on(self, stream: BufferedReader, start: int, stop: int | None) -> Records:
        """Return the rows below the names; the offset of each is its first line, from 1."""
        csv.field_size_limit(limits.MAX_DOCUMENT_BYTES)
        with TextIOWrapper(stream, "utf-8", "surrogateescape", newline="") as lines:  # bytes as is
            short = _ShortRows(lines)
            rows = csv.reader(short, delimiter=self.delimiter, strict=True)
            line = 1
            try:
                names = next(rows, [])
                problem = not_one(self.options.text_field, names)
                if problem is not None:
                    yield Bad(WHOLE, "no text", f"{problem}; name one in data.text_field")
                    return
                column, line = names.index(self.options.text_field), rows.line_num + 1
                short.held = 0
                for row in rows:
                    short.held = 0
                    if len(row) == len(names):
                        text = row[column].encode("utf-8", "surrogateescape")
                        yield checked(line, text, self.options)
                    elif row:
                        lengths = f"length {len(row)}, the first has length {len(names)}"
                        yield Bad(line, "no text", f"a row of {lengths}")
                    line = rows.line_num + 1
            except csv.Error as error:
                raise InputError(f"{self.file}:{line}: not a row of a table ({error})") from None

    def name(self, offset: int) -> str:
        return f"{self.file}:{offset}"


class TabSeparated(CommaSeparated):
    """The same with tabs."""

    delimiter = "\t"


class _ShortRows:
    """Lines for a reader of rows, so that memory holds no row that is longer than a document."""

    def __init__(self, lines: TextIOWrapper):
        self.lines, self.held = lines, 0  # characters of the row that is being read

    def __iter__(self) -> "_ShortRows":
        return self

    def __next__(self) -> str:
        line = self.lines.readline(limits.MAX_DOCUMENT_BYTES + 1)
        self.held += len(line)
        if self.held > limits.MAX_DOCUMENT_BYTES:
            raise csv.Error(f"a row longer than {limits.MAX_DOCUMENT_BYTES >> 20} MiB")
        if not line:
            raise StopIteration
        return line


READERS = {".csv": CommaSeparated, ".tsv": TabSeparated}
