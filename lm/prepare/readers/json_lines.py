"""Read JSON lines; refuse other JSON with the reason."""

import json
from collections.abc import Container
from pathlib import Path

from lm.prepare.readers.text import Text
from lm.prepare.records import NAME_ANOTHER, SKIP, WHOLE, Bad, Found, ReadOptions, checked
from lm.prepare.signatures import LEAVE_OUT


class JsonLines(Text):
    """One JSON object per line, the text in one of its fields."""

    description = "JSON lines, field {}"
    is_plain = False
    name_mark = ":"
    wrong_json: Container[str | None] = ()  # instead, each line is checked

    def __init__(self, file: Path, options: ReadOptions):
        from orjson import loads

        super().__init__(file, options)
        self._loads = loads

    def separator(self) -> bytes:
        return b"\n"

    def record(self, offset: int, data: bytes) -> Found | Bad | None:
        if not data or data.isspace():
            return None
        try:
            text = self._loads(data)[self.options.text_field]
        except (ValueError, LookupError, TypeError):
            text = None
        if isinstance(text, str):
            return checked(offset, text.encode(), self.options)
        return _unusual_line(offset, data, self.options)


class Json(JsonLines):
    """JSON lines; an array or a value over several lines is one bad record."""

    wrong_json = ("array", "value")


class Notebook(Text):
    """A Jupyter notebook, code and prose in JSON: one bad record."""

    description = "no text: notebook"
    is_plain = False

    def foreign(self, head: bytes) -> Bad | None:
        convert = "a notebook; convert it (jupyter nbconvert --to script)"
        return Bad(WHOLE, "raw JSON", f"{convert} {LEAVE_OUT}")


def _unusual_line(offset: int, data: bytes, options: ReadOptions) -> Found | Bad:
    """Read a line in which orjson found no text; return its record or what is wrong with it."""
    line = checked(offset, data, options, base=offset)
    if isinstance(line, Bad):
        return line
    field = options.text_field
    try:
        record = json.loads(line.data)
    except (ValueError, RecursionError) as error:
        return Bad(offset, "not JSON", f"not valid JSON ({error}); correct the line {SKIP}")
    if not isinstance(record, dict):
        return Bad(offset, "no text", f"not an object with field '{field}'; correct it {SKIP}")
    remedy = f"{NAME_ANOTHER} {SKIP}"
    if field not in record:
        has = ", ".join(record)[:200]
        return Bad(offset, "no text", f"no field '{field}' (has: {has}); {remedy}")
    if not isinstance(record[field], str):
        kind = "null" if record[field] is None else type(record[field]).__name__
        return Bad(offset, "no text", f"field '{field}' is {kind}, not text; {remedy}")
    # JSON can spell half a surrogate pair; its bytes are not UTF-8
    found = checked(offset, record[field].encode("utf-8", "surrogatepass"), options)
    if isinstance(found, Bad):
        return found
    return found._replace(replaced=found.replaced + line.replaced)


READERS = {
    ".jsonl": JsonLines,
    ".jsonlines": JsonLines,
    ".ndjson": JsonLines,
    ".json": Json,
    ".ipynb": Notebook,
}
