"""The user's files as a stream of documents, split into training and validation text.

    data.path --source_files--> files --READERS--> documents --split_documents--> (split, document)

Memory holds one document at a time, and none is longer than MAX_DOCUMENT_BYTES. Nothing is repaired
or left out in silence: what cannot be read is an error that names the place; what was replaced on
request, and empty documents, are counted.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedIOBase, BufferedReader
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from lm.config import INSIDE_ONE, NOT_EMPTY, Count
from lm.errors import InputError

CHUNK_BYTES = 1 << 24
MAX_DOCUMENT_BYTES = 1 << 26  # the tokenizer takes up to 140 bytes of memory for each: 9 GB
PACKED = (  # what a file is by the bytes at an offset, and what to do with it
    (0, b"PK\x03\x04", "a zip archive", "unpack it"),
    (257, b"ustar", "a tar archive", "unpack it"),
    (0, b"\x1f\x8b", "compressed by gzip", "decompress it"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd", "decompress it"),
    (0, b"\xfd7zXZ", "compressed by xz", "decompress it"),
    (4, b"1AY&SY", "compressed by bzip2", "decompress it"),
    (0, b"PAR1\x15", "a parquet table", "convert it to .jsonl"),
)


@dataclass(frozen=True)
class DataConfig:
    """The section `data`: which text, and how it is split."""

    source: Literal["packages", "grammar"]  # what stage corpus writes into data/raw
    packages: list[str]  # as name==version
    grammar_bytes: Count  # of stories
    path: Annotated[str, NOT_EMPTY]  # a file or a folder
    glob: str  # which files of a folder, e.g. "**/*.py"
    text_field: str  # of .jsonl objects
    separator: (
        Annotated[str, NOT_EMPTY] | None
    )  # cuts plain-text files into documents; null: one file, one document
    encoding_errors: Literal["strict", "replace"]
    split: Literal["hash", "tail"]
    valid_fraction: Annotated[float, INSIDE_ONE]


class Document(NamedTuple):
    """One text and where it comes from, e.g. "notes/a.md" or "books.jsonl:17"."""

    name: str
    text: str


def source_files(config: DataConfig) -> list[Path]:
    """The files to read, sorted by path; hidden ones are left out.

    A link to a file is followed, since DVC can fill a folder with links into its cache. Raises
    InputError when there is no file, and for what is neither a file nor a folder: reading a pipe or
    a device need never end, and what lies behind a link to a folder DVC does not watch.
    """
    path = Path(config.path)
    if path.is_file():
        return [path]
    if path.exists() and not path.is_dir():
        raise InputError(f"data.path = {path}: a pipe or a device; name a file or a folder")
    if not path.is_dir():
        hint = "; a pattern goes into data.glob" if set("*?[") & set(config.path) else ""
        raise InputError(f"data.path = {config.path}: no such file or folder{hint}")
    try:
        matches = list(path.glob(config.glob))
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"data.glob = {config.glob}: {error}") from None
    seen = [
        match
        for match in matches
        if not any(part.startswith(".") for part in match.relative_to(path).parts)
    ]
    files = [match for match in seen if match.is_file()]
    for match in sorted(set(seen) - set(files)):
        if match.is_symlink() or not match.is_dir():
            raise InputError(
                f"{match}: a pipe, a device, a broken link or a link to a folder; take it away or "
                "leave it out by data.glob"
            )
    if not files:
        raise InputError(f"data.path = {config.path}: no file matches data.glob = {config.glob}")
    return sorted(files, key=lambda file: file.as_posix())


def documents(config: DataConfig, tally: Counter[str]) -> Iterator[Document]:
    """Every document that holds more than white space, in a fixed order.

    Adds to tally["empty_documents"] and tally["replacement_characters"]. Raises InputError for
    bytes that are not UTF-8 (unless data.encoding_errors is "replace") and for a malformed file.
    """
    found = False
    for file in source_files(config):
        for document in READERS.get(file.suffix, _read_plain_text)(file, config, tally):
            if document.text.strip():
                found = True
                yield document
            else:
                tally["empty_documents"] += 1
    if not found:
        raise InputError(f"data.path = {config.path}: no text")


def _read_plain_text(file: Path, config: DataConfig, tally: Counter[str]) -> Iterator[Document]:
    with _opened(file) as stream:
        if config.separator is None:
            raw = stream.read(MAX_DOCUMENT_BYTES + 1)
            yield Document(str(file), _decode(raw, str(file), 0, config, tally))
            return
        offset = 0
        for number, part in enumerate(_parts(stream, config.separator.encode()), start=1):
            text = _decode(part, str(file), offset, config, tally)
            offset += len(part) + len(config.separator.encode())
            yield Document(f"{file}#{number}", text.strip("\r\n"))  # they belong to the cut


def _parts(stream: BufferedIOBase, separator: bytes) -> Iterator[bytes]:
    """What lies between the separators; a part that is too long is not read to its end."""
    rest = bytearray()
    while len(rest) <= MAX_DOCUMENT_BYTES and (chunk := stream.read(CHUNK_BYTES)):
        searched = max(0, len(rest) - len(separator) + 1)
        rest += chunk
        while (end := rest.find(separator, searched)) >= 0:
            yield bytes(rest[:end])
            del rest[: end + len(separator)]
            searched = 0
    yield bytes(rest)


def _read_jsonl(file: Path, config: DataConfig, tally: Counter[str]) -> Iterator[Document]:
    field, offset = config.text_field, 0
    with _opened(file) as stream:
        lines = iter(lambda: stream.readline(MAX_DOCUMENT_BYTES + 1), b"")
        for number, line in enumerate(lines, start=1):
            name = f"{file}:{number}"
            decoded = _decode(line, name, offset, config, tally)
            offset += len(line)
            if not decoded.strip():
                continue
            try:
                record = json.loads(decoded)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{name}: not valid JSON ({error})") from None
            if not isinstance(record, dict):
                raise InputError(f"{name}: not an object with a field '{field}'")
            if field not in record:
                known = ", ".join(record)[:200]
                raise InputError(f"{name}: no field '{field}' (has: {known})")
            if not isinstance(record[field], str):
                raise InputError(
                    f"{name}: field '{field}' is not text; name one in data.text_field"
                )
            # JSON can spell half a surrogate pair; its bytes are refused as not UTF-8
            raw = record[field].encode("utf-8", "surrogatepass")
            yield Document(name, _decode(raw, f"{name}: field '{field}'", 0, config, tally))


READERS: dict[str, Callable[[Path, DataConfig, Counter[str]], Iterator[Document]]] = {
    ".jsonl": _read_jsonl,
}  # every other suffix is plain text


def _opened(file: Path) -> BufferedReader:
    """The file, opened to be read. Raises InputError for what is no text but packs some."""
    stream = open(file, "rb")  # noqa: SIM115 - the caller's `with` closes it
    head = stream.peek(512)
    for offset, signature, what, remedy in PACKED:
        if head.startswith(signature, offset):
            stream.close()
            raise InputError(f"{file}: {what}, not text; {remedy} or leave it out by data.glob")
    return stream


def _decode(raw: bytes, name: str, offset: int, config: DataConfig, tally: Counter[str]) -> str:
    """The text of bytes that begin at `offset` of what `name` names.

    A NUL byte is UTF-8 but no text: it marks UTF-16, a binary file, or zeros after a crash.
    """
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise InputError(
            f"{name}: a document longer than {MAX_DOCUMENT_BYTES >> 20} MiB; cut it into several, "
            "by data.separator or, in a .jsonl file, by lines"
        )
    try:
        text, nul = raw.decode("utf-8"), raw.find(0)
        if nul < 0:
            return text
        bad, what = nul, "not text"
    except UnicodeDecodeError as error:
        bad, what = error.start, "not UTF-8"
    if config.encoding_errors == "strict":
        raise InputError(
            f"{name}: byte 0x{raw[bad]:02x} at offset {offset + bad} is {what}; "
            "convert the file, leave it out, or set data.encoding_errors: replace"
        )
    text = raw.decode("utf-8", "replace").replace("\0", "\ufffd")
    inserted = text.count("\ufffd") - raw.count("\ufffd".encode())
    tally["replacement_characters"] += inserted
    return text


def split_documents(config: DataConfig, tally: Counter[str]) -> Iterator[tuple[str, Document]]:
    """Every document with its split, "train" or "valid". Raises InputError if one stays empty.

    "hash": by the SHA-256 of the text, so a document keeps its side when others come or go,
    and exact duplicates stay together. "tail": the last data.valid_fraction of the bytes, in
    reading order, cut at a line break where there is one.
    """
    empty = {"train", "valid"}
    for split, document in (_split_by_hash if config.split == "hash" else _split_tail)(
        config, tally
    ):
        empty.discard(split)
        yield split, document
    for split in empty:
        raise InputError(
            f"the {split} split has no documents; change data.valid_fraction, set data.split: tail "
            "(for one file or a few), cut the text with data.separator, or add text"
        )


def _split_by_hash(config: DataConfig, tally: Counter[str]) -> Iterator[tuple[str, Document]]:
    for document in documents(config, tally):
        digest = hashlib.sha256(document.text.encode()).digest()
        draw = int.from_bytes(digest[:8], "little") / 2**64
        yield ("valid" if draw < config.valid_fraction else "train"), document


def _split_tail(config: DataConfig, tally: Counter[str]) -> Iterator[tuple[str, Document]]:
    total = sum(len(document.text.encode()) for document in documents(config, Counter()))
    boundary, seen = int(total * (1 - config.valid_fraction)), 0
    for document in documents(config, tally):
        data = document.text.encode()
        cut = _cut_position(data, boundary - seen)
        if cut > 0:
            yield "train", Document(document.name, data[:cut].decode())
        if cut < len(data):
            yield "valid", Document(document.name, data[cut:].decode())
        seen += len(data)


def _cut_position(data: bytes, wanted: int) -> int:
    """Where to cut UTF-8 text near byte `wanted`: after a line break, else between characters."""
    if wanted <= 0 or wanted >= len(data):
        return min(max(wanted, 0), len(data))
    after_line = data.find(b"\n", wanted) + 1
    if 0 < after_line < len(data):
        return after_line
    while wanted < len(data) and data[wanted] & 0xC0 == 0x80:  # inside a character
        wanted += 1
    return wanted
