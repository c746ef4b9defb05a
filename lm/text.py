"""The user's files as a stream of documents, split into training and validation text.

    data.path --source_files--> files --READERS--> documents --split_documents--> (split, document)

Memory holds one document at a time. Nothing is repaired in silence: what cannot be read is an
error that names the place; what was replaced on request, and empty documents, are counted.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from lm.config import INSIDE_ONE, NOT_EMPTY
from lm.errors import InputError

CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class DataConfig:
    """The section `data`: which text, and how it is split."""

    packages: list[str]  # the default corpus, as name==version; only stage corpus reads it
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

    Raises InputError when there are none.
    """
    path = Path(config.path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        hint = "; a pattern goes into data.glob" if set("*?[") & set(config.path) else ""
        raise InputError(f"data.path = {config.path}: no such file or folder{hint}")
    try:
        matches = list(path.glob(config.glob))
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"data.glob = {config.glob}: {error}") from None
    files = [
        file
        for file in matches
        if file.is_file() and not any(p.startswith(".") for p in file.relative_to(path).parts)
    ]
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
    if config.separator is None:
        yield Document(str(file), _decode(file.read_bytes(), str(file), 0, config, tally))
        return
    separator, number, offset, rest = config.separator.encode(), 0, 0, b""
    with open(file, "rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            *whole, rest = (rest + chunk).split(separator)
            for part in whole:
                text = _decode(part, str(file), offset, config, tally)
                number, offset = number + 1, offset + len(part) + len(separator)
                yield Document(f"{file}#{number}", text.strip("\r\n"))  # they belong to the cut
    text = _decode(rest, str(file), offset, config, tally)
    yield Document(f"{file}#{number + 1}", text.strip("\r\n"))


def _read_jsonl(file: Path, config: DataConfig, tally: Counter[str]) -> Iterator[Document]:
    field, offset = config.text_field, 0
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, start=1):
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
                raise InputError(f"{name}: no field '{field}' (has: {', '.join(record)})")
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


def _decode(raw: bytes, name: str, offset: int, config: DataConfig, tally: Counter[str]) -> str:
    """The text of bytes that begin at `offset` of what `name` names."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if config.encoding_errors == "strict":
            raise InputError(
                f"{name}: byte 0x{raw[error.start]:02x} at offset {offset + error.start} is not "
                "UTF-8; convert the file, leave it out, or set data.encoding_errors: replace"
            ) from None
    text = raw.decode("utf-8", "replace")
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
