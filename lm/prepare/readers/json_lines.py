"""JSON lines, and other JSON in order to refuse it with the reason."""

import json
from collections.abc import Container
from pathlib import Path

from lm.prepare.readers.text import Text
from lm.prepare.records import WHOLE, Bad, Found, ReadOptions, checked
from lm.prepare.signatures import LEAVE_OUT


class JsonLines(Text):
    """One JSON object a line, the text in one of its fields."""

    description = "JSON lines, field {}"
    is_plain = False
    name_mark = ":"
    wrong_json: Container[str | None] = ()  # each line is judged

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
    """JSON lines, unless the content is one value over several lines."""

    wrong_json = ("array", "value")


class Notebook(Text):
    """Code and prose in JSON: one bad record."""

    description = "no text: notebook"
    is_plain = False

    def foreign(self, head: bytes) -> Bad | None:
        convert = "a notebook; convert it (jupyter nbconvert --to script)"
        return Bad(WHOLE, "raw JSON", f"{convert} {LEAVE_OUT}")


def _unusual_line(offset: int, data: bytes, options: ReadOptions) -> Found | Bad:
    """Read a line in which orjson found no text; return it or the reason why it has none."""
    line = checked(offset, data, options, base=offset)
    if isinstance(line, Bad):
        return line
    field = options.text_field
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
