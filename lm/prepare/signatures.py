"""Signatures: first bytes of a file that contradict its suffix."""

import re
from collections.abc import Container

from lm.prepare.records import WHOLE, Bad

LEAVE_OUT = "or leave it out (data.glob, data.on_bad_document: skip)"
MARK = b"\xef\xbb\xbf"  # byte-order mark: U+FEFF at the start of a file, not part of the text
PACKED = (  # an offset, the bytes there, what the file is and what to do with it
    (0, b"PK\x03\x04", "a zip archive, not text; unpack it"),
    (257, b"ustar", "a tar archive, not text; unpack it"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive, not text; unpack it"),
    (0, b"Rar!\x1a\x07", "a rar archive, not text; unpack it"),
    (0, b"\x1f\x8b", "compressed by gzip, not text; give it the suffix .gz"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd, not text; give it the suffix .zst"),
    (0, b"\xfd7zXZ", "compressed by xz, not text; decompress it"),
    (4, b"1AY&SY", "compressed by bzip2, not text; decompress it"),
    (0, b"\x04\x22\x4d\x18", "compressed by lz4, not text; decompress it"),
    (0, b"PAR1\x15", "a parquet table, not text; give it the suffix .parquet"),
    (0, b"ARROW1\0\0", "an Arrow table, not text; save it as .parquet"),
    (0, b"\xff\xff\xff\xff", "an Arrow table, not text; save it as .parquet"),
    (0, b"SQLite format 3\0", "an SQLite database, not text; export its text"),
    (0, b"%PDF-", "a PDF, not text; convert it"),
    (0, b"\x89PNG", "an image, not text; remove it"),
    (0, b"\xff\xd8\xff", "an image, not text; remove it"),
    (0, b"GIF8", "an image, not text; remove it"),
)
JSON = {  # kinds of JSON that a file may hold but should not
    "lines": "JSON lines, not text; give it the suffix .jsonl",
    "array": "a JSON array, not one object per line; convert it (jq -c '.[]')",
    "value": "JSON over several lines, not one object per line; convert it (jq -c .)",
}


def foreign(head: bytes, is_compressed: bool, wrong_json: Container[str | None]) -> Bad | None:
    """Return the whole file as one bad record if its first bytes show that it is not text.

    `wrong_json` holds the kinds of JSON (keys of JSON) that the file's own format refuses.
    """
    for offset, signature, what in PACKED:
        if head.startswith(signature, offset):
            if is_compressed and what.startswith("compressed"):
                what = "compressed twice, not text; decompress it once"
            return Bad(WHOLE, "not text", f"{what} {LEAVE_OUT}")
    kind = _json_kind(head)
    if kind is None or kind not in wrong_json:
        return None
    return Bad(WHOLE, "raw JSON", f"{JSON[kind]} {LEAVE_OUT}")


def _json_kind(head: bytes) -> str | None:
    """Return the kind of JSON that `head` begins (a key of JSON), or None."""
    text = head.removeprefix(MARK).lstrip()
    if re.match(rb'\[\s*\{\s*"', text):
        return "array"
    if not text.startswith(b"{"):
        return None
    import orjson

    line, line_break, _ = text.partition(b"\n")
    try:
        return "lines" if isinstance(orjson.loads(line), dict) and line.strip() != b"{}" else None
    except ValueError:  # a line that is longer than the head may be JSON
        is_long = not line_break and re.match(rb'\{\s*"[^"]*"\s*:', text)
        return "lines" if is_long else "value"
