"""Read tables of comma-separated and of tab-separated values."""

import csv
from collections.abc import Iterator
from io import BufferedReader, TextIOWrapper

from lm.base.errors import InputError
from lm.prepare import limits
from lm.prepare.readers.text import Text
from lm.prepare.records import SKIP, WHOLE, Bad, Records, checked, not_one


class CommaSeparated(Text):
    """A table whose first line names the columns, the text in one of them."""

    description = "table, column {}"
    is_plain = False
    delimiter = ","
    wrong_json = ()

    def starts(self, size: int) -> list[int]:
        return [0]  # a row may hold line breaks in quotes: only the start of the file tells

    def read_on(self, stream: BufferedReader, start: int, stop: int | None) -> Records:
        """Yield the rows below the header; the offset of a row is its first line, from 1."""
        csv.field_size_limit(limits.MAX_DOCUMENT_BYTES)
        held, line = 0, 1  # characters and first line of the row that is being read

        def lines() -> Iterator[str]:
            nonlocal held
            while text := wrapper.readline(limits.MAX_DOCUMENT_BYTES + 1):
                held += len(text)
                if held > limits.MAX_DOCUMENT_BYTES:
                    raise csv.Error(f"a row longer than {limits.MAX_DOCUMENT_BYTES >> 20} MiB")
                yield text

        # surrogateescape keeps bytes that are not UTF-8
        with TextIOWrapper(stream, "utf-8", "surrogateescape", newline="") as wrapper:
            rows = csv.reader(lines(), delimiter=self.delimiter, strict=True)
            try:
                names = next(rows, [])
                if problem := not_one(self.options.text_field, names):
                    yield Bad(WHOLE, "no text", problem)
                    return
                column = names.index(self.options.text_field)
                held, line = 0, rows.line_num + 1
                for row in rows:
                    if len(row) == len(names):
                        text = row[column].encode("utf-8", "surrogateescape")
                        yield checked(line, text, self.options)
                    elif row:
                        fields = f"{len(names)} fields as in the header, found {len(row)}"
                        remedy = f"quote fields that hold {self.delimiter!r} {SKIP}"
                        yield Bad(line, "no text", f"expected {fields}; {remedy}")
                    held, line = 0, rows.line_num + 1
            except csv.Error as error:
                raise InputError(
                    f"{self.file}:{line}: not a row of a table ({error}); check its quotes"
                ) from None

    def name(self, offset: int) -> str:
        return f"{self.file}:{offset}"


class TabSeparated(CommaSeparated):
    """The same, separated by tabs."""

    delimiter = "\t"


READERS = {".csv": CommaSeparated, ".tsv": TabSeparated}
