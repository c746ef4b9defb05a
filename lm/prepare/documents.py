"""The user's files as documents, and the shards in which processes share them out.

    data.path, data.sources --sources--> files --plan--> shards --documents--> (place, bytes)
                                                                    --sides--> train or valid

The order is fixed: sources as params.yaml lists them, files by path, documents as they stand.
Nothing is repaired or left out in silence: what cannot be read is an error that names the place,
and what was left out or replaced on request is counted.
"""

import hashlib
import json
import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, NamedTuple

from lm.base.config import INSIDE_ONE, NOT_EMPTY, POSITIVE, Bound, Count
from lm.base.errors import InputError
from lm.prepare.formats import PLAIN, WHOLE, Bad, Found, Layout, format_of, holds, suffix_of
from lm.prepare.listing import (
    SUFFIX,
    is_file,
    is_hidden_from_dvc,
    listed_folder,
    visible,
    walk,
    watched,
)

Side = Literal["train", "valid"]
REPLACED = "replacement characters"  # beside the reasons for which documents are left out
SHOWN_SUFFIX = re.compile(r"none|\.[a-z0-9.+_-]{1,16}")
SOURCE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")  # names files
OUTPUTS = ("data/tokenizer", "data/tokens", "metrics", "models")  # of stages that read text
SHORTEST_SHARD = Bound(lambda x: x >= 1 << 16, f"must be >= {1 << 16}")


@dataclass(frozen=True)
class SourceConfig:
    """One of `data.sources`: a part of the text."""

    path: Annotated[str, NOT_EMPTY]  # in data.path: a file, a folder or a pattern
    text_field: str  # of JSON objects, the column of tables
    weight: Annotated[float, POSITIVE] | None  # its share of the training windows; null: its size


@dataclass(frozen=True)
class DataConfig:
    """The section `data`: which text, and how it is split."""

    path: Annotated[
        str,
        NOT_EMPTY,
        "the text: a file, a folder or a listing (docs/SCALE.md); `data/raw` is the default text",
    ]
    glob: Annotated[str, "which files of the folder"]
    text_field: Annotated[str, "the field of JSON objects, the column of tables"]
    sources: Annotated[
        dict[str, SourceConfig] | None,
        "parts of `data.path` (a file, folder or pattern in it), each with its share of the "
        "training windows; weight null: by size; null: all of it is one",
    ]
    separator: Annotated[
        Annotated[str, NOT_EMPTY] | None,
        'cuts text files into documents, e.g. `<|endoftext|>`, or `"\\n\\n"` in double quotes; '
        "must stand in one of them; null: one file, one document",
    ]
    encoding_errors: Annotated[
        Literal["strict", "replace"],
        "stop at NUL and at bytes that are not UTF-8, or count and replace them",
    ]
    on_bad_document: Annotated[
        Literal["stop", "skip"],
        "at what is no text (a null, bad JSON, bytes, too long): stop, or leave it out and count",
    ]
    deduplicate: Annotated[bool, "leave out exact duplicates"]
    split: Annotated[
        Literal["hash", "tail"],
        "by a hash of each document (stable when others come and go), or the last part of the text",
    ]
    valid_fraction: Annotated[float, INSIDE_ONE, "the share held out for validation"]
    shard_bytes: Annotated[Count, SHORTEST_SHARD, "text in one shard of tokens, about"]
    max_expansion: Annotated[
        Count,
        "stop where a `.gz`, a `.zst` or the column of a parquet table holds more than this many "
        "times its size (and than 64 MiB)",
    ]

    def __post_init__(self) -> None:
        if self.sources is None:
            return
        if not self.sources:
            raise InputError("data.sources = {}: names no source; null makes all of data.path one")
        for name in self.sources:
            if not SOURCE_NAME.fullmatch(name):
                raise InputError(
                    f"data.sources.{name}: a source's name names files: a-z, 0-9, - and _ only"
                )
        without = [name for name, source in self.sources.items() if source.weight is None]
        if 0 < len(without) < len(self.sources):
            raise InputError(
                f"data.sources.{without[0]}.weight = null: give every source a weight, or none"
            )


class Source(NamedTuple):
    """Files that are read alike."""

    name: str
    files: list[Path]
    layout: Layout
    left_out: Counter[str]  # files, by why they are not read


class Piece(NamedTuple):
    """A stretch of a file, as lm.prepare.formats counts; `stop` None: to its end."""

    file: Path
    start: int
    stop: int | None


class Shard(NamedTuple):
    """What one process reads and one shard of tokens holds."""

    source: str
    layout: Layout
    pieces: tuple[Piece, ...]
    size_bytes: int  # on the disk, about


class Place(NamedTuple):
    """Where a document stands; as text, e.g. "notes/a.md" or "books.jsonl:17"."""

    file: Path
    layout: Layout
    offset: int

    def __str__(self) -> str:
        if self.offset == WHOLE:
            return str(self.file)
        return format_of(self.file).name(*self)


class Document(NamedTuple):
    """One text in UTF-8, and where it comes from."""

    place: Place
    data: bytes

    @property
    def text(self) -> str:
        return self.data.decode()


# --- files ------------------------------------------------------------------------------


def sources(config: DataConfig) -> list[Source]:
    """The sources with their files, sorted by path: those that DVC watches, but for hidden ones.

    Raises InputError when there is no file, and for what is neither a file nor a folder: reading a
    pipe or a device need never end, and what lies behind a link to a folder DVC does not watch.
    """
    separator = None if config.separator is None else config.separator.encode()
    replace, root = config.encoding_errors == "replace", text_root(config)
    is_listed = root != Path(config.path)
    for output in OUTPUTS if root.exists() else ():
        place, text = Path(output).resolve(), root.resolve()
        if place.is_relative_to(text) or text.is_relative_to(place):
            raise InputError(
                f"data.path = {config.path}: the stages write {output}; put your text into a "
                "folder of its own and name that"
            )
    if config.sources is None:
        files, left_out = _files(root, config.glob, "data.path", str(root), is_listed)
        layout = Layout(config.text_field, separator, replace, config.max_expansion)
        return [Source("text", files, layout, left_out)]
    if not root.is_dir():
        what = "a file; data.sources needs the folder they are in"
        raise InputError(f"data.path = {root}: {what if root.exists() else 'no such folder'}")
    if not is_listed:
        deque(watched(root, Counter()), maxlen=0)  # all of it is DVC's to hash, whatever is read
    found = []
    for name, source in config.sources.items():
        key, within = f"data.sources.{name}.path", Path(source.path)
        if within.is_absolute() or ".." in within.parts:
            raise InputError(
                f"{key} = {within}: must lie in data.path = {config.path}, which DVC watches"
            )
        above = [root / part for part in (within, *within.parents) if part.parts]
        if any(part.is_symlink() and part.is_dir() for part in above):
            raise InputError(
                f"{key} = {within}: a link to a folder, which DVC does not watch; name the folder "
                "itself"
            )
        is_pattern = not (root / within).exists() and set("*?[") & set(source.path)
        if not is_listed and is_hidden_from_dvc(root / within):
            raise InputError(f"{key} = {within}: hidden from DVC by .dvcignore or a nested project")
        folder, pattern = (root, source.path) if is_pattern else (root / within, config.glob)
        files, left_out = _files(folder, pattern, key, source.path, is_listed)
        layout = Layout(source.text_field, separator, replace, config.max_expansion)
        found.append(Source(name, files, layout, left_out))
    return found


def text_root(config: DataConfig) -> Path:
    """What data.path names: a file, a folder, or the folder behind a listing (see listing.py)."""
    path = Path(config.path)
    return listed_folder(path) if path.suffix == SUFFIX and path.is_file() else path


def source_files(config: DataConfig) -> list[Path]:
    """The files of all sources."""
    return [file for source in sources(config) for file in source.files]


def weights(config: DataConfig) -> dict[str, float | None]:
    """The names of the sources and their shares of the training windows; no file is looked at."""
    if config.sources is None:
        return {"text": None}
    return {name: source.weight for name, source in config.sources.items()}


def in_words(left_out: Counter[str]) -> str:
    """What is not read, and why, in words."""
    return "; ".join(f"{reason}: {count:,}" for reason, count in sorted((+left_out).items()))


def _files(
    path: Path, pattern: str, key: str, value: str, is_listed: bool
) -> tuple[list[Path], Counter[str]]:
    """The file, or those of the folder that match, and how many are left out, by reason.

    `key` = `value` is the setting to blame. What a listing names DVC need not watch.
    """
    left_out: Counter[str] = Counter()
    if path.is_file():
        if _is_of_dvc(path.name):
            raise InputError(f"{key} = {value}: a file of DVC's own; name the text it stands for")
        return [path], left_out
    if path.exists() and not path.is_dir():
        raise InputError(f"{key} = {value}: a pipe or a device; name a file or a folder")
    if not path.is_dir():
        raise InputError(f"{key} = {value}: no such file or folder{_advice(value)}")
    pattern_key = key if pattern == value else "data.glob"
    wanted = PurePosixPath(pattern).parts
    if not wanted or wanted[0] == "/" or any("**" in part and part != "**" for part in wanted):
        raise InputError(
            f"{pattern_key} = {pattern}: no pattern of paths in the folder, as **/*.txt is one"
        )
    at = len(f"{path}/")
    texts: list[str] = []
    links: list[str] = []
    listed = chain.from_iterable(visible(entries) for _, entries in walk(path))
    for entry in listed if is_listed else watched(path, left_out):
        if entry.is_dir(follow_symlinks=False):
            continue
        if not _matches(entry.path[at:].split("/"), wanted):
            if entry.is_symlink() and Path(entry.path).is_dir():
                left_out["links to folders"] += 1
            continue
        if not is_file(entry):
            raise InputError(
                f"{entry.path}: a pipe, a device, a broken link or a link to a folder; take it "
                "away or leave it out by data.glob"
            )
        if _is_of_dvc(entry.name):
            left_out["files of DVC's own"] += 1
        else:
            (links if entry.is_symlink() else texts).append(entry.path)
    if links:
        different = _different(sorted(links), texts)
        left_out["links to a text that is read already"] = len(links) - len(different)
        texts += different
    if not texts:
        hint = "; braces have no meaning, use data.sources" if "{" in pattern else ""
        hint += f"; not read: {in_words(left_out)}" if +left_out else ""
        raise InputError(f"{key} = {value}: no file matches {pattern_key} = {pattern}{hint}")
    return [Path(text) for text in sorted(texts)], left_out


def _advice(value: str) -> str:
    """What to do about a data.path that names nothing."""
    if set("*?[") & set(value):
        return "; a pattern goes into data.glob"
    if value.startswith("~"):
        return "; ~ is known to shells alone, write the path in full"
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", value):
        return (
            "; a data set of Hugging Face is not downloaded: "
            f"hf download {value} --repo-type dataset --local-dir FOLDER"
        )
    return ""


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path matches a pattern, in which ** stands for any number of folders."""
    parts, pattern = list(parts), list(pattern)
    while pattern and pattern[-1] != "**":  # from the end, where most are decided at once
        if not parts or not fnmatchcase(parts.pop(), pattern.pop()):
            return False
    reached = {0}  # how many parts the pattern so far can stand for
    for wanted in pattern:
        if wanted == "**":
            reached = set(range(min(reached), len(parts) + 1))
        else:
            inside = (i for i in reached if i < len(parts))
            reached = {i + 1 for i in inside if fnmatchcase(parts[i], wanted)}
        if not reached:
            return False
    return len(parts) in reached


def _is_of_dvc(name: str) -> bool:
    """Whether DVC keeps a file of this name beside what it tracks."""
    return name.endswith(".dvc") or name in ("dvc.yaml", "dvc.lock")


def _different(links: Sequence[str], texts: Sequence[str]) -> list[str]:
    """The links that lead to no text that is read already, each of them once.

    Links into a cache of DVC are its way to store a copy (cache.type): as many as there are.
    """
    seen = set(map(_identity, texts))
    different = []
    for link in links:
        identity = _identity(link)
        if identity not in seen or "/files/md5/" in str(Path(link).readlink()):
            different.append(link)
        seen.add(identity)
    return different


def _identity(file: str) -> tuple[int, int]:
    status = Path(file).stat()
    return status.st_dev, status.st_ino


# --- shards -----------------------------------------------------------------------------


def plan(config: DataConfig, found: Sequence[Source] | None = None) -> list[Shard]:
    """All of the text in shards of about data.shard_bytes, in reading order; of what was found.

    A long file is cut after multiples of that size, where a record begins. Short ones go together,
    and whether a file is the last of its shard is drawn from its name: so a file that comes or goes
    changes the shard that it stands in and no other (content-defined chunking, Muthitacharoen et
    al. 2001, by names).
    """
    root, found = text_root(config), sources(config) if found is None else found
    _require_separator(found)
    return [
        Shard(source.name, source.layout, tuple(pieces), size_bytes)
        for source in found
        for pieces, size_bytes in _grouped(source, root, config.shard_bytes)
    ]


def _grouped(source: Source, root: Path, size: int) -> Iterator[tuple[list[Piece], int]]:
    together: list[Piece] = []
    held, at = 0, len(f"{root}/")
    for file in source.files:
        starts = format_of(file).starts(file, source.layout, size)
        length = file.stat().st_size
        if len(starts) > 1:
            if together:
                yield together, held
            together, held = [], 0
            for start, stop in zip(starts, [*starts[1:], None], strict=True):
                yield [Piece(file, start, stop)], length // len(starts)
            continue
        together.append(Piece(file, 0, None))
        held += length
        name = file.name if file == root else str(file)[at:]
        if draw(os.fsencode(name)) < length / size or held > 4 * size:
            yield together, held
            together, held = [], 0
    if together:
        yield together, held


def _require_separator(found: Sequence[Source]) -> None:
    """Raise InputError if there are text files and data.separator stands in none of them."""
    plain = [(f, s.layout) for s in found for f in s.files if format_of(f) is PLAIN]
    separator = plain[0][1].separator if plain else None
    if separator is None or any(holds(file, layout, separator) for file, layout in plain):
        return
    shown = partial(json.dumps, ensure_ascii=False)
    hint = "set it to what stands between two documents, or to null"
    for meant, cause in (
        (separator.replace(b"\\n", b"\n"), "it is a backslash and an n, the text has line breaks"),
        (separator.replace(b"\n", b"\r\n"), "the text has Windows line ends"),
        (separator.replace(b"\\n", b"\r\n"), "the text has Windows line ends"),
    ):
        if meant != separator and any(holds(file, layout, meant) for file, layout in plain):
            hint = f"{cause}: write {shown(meant.decode())} in params.yaml"
            break
    raise InputError(
        f"data.separator = {shown(separator.decode())}: stands in no text file; {hint}"
    )


class Kind(NamedTuple):
    """Files of a source that have one suffix, and how they are read."""

    source: str
    suffix: str
    read_as: str
    files: list[Path]


def kinds(shards: Iterable[Shard]) -> list[Kind]:
    """What is read, by source and suffix; odd suffixes together."""
    found: dict[tuple[str, str, str], list[Path]] = {}
    for shard in shards:
        for file, start, _ in shard.pieces:
            if start == 0:
                suffix = suffix_of(file) or "none"
                suffix = suffix if SHOWN_SUFFIX.fullmatch(suffix) else "other"
                read_as = format_of(file).what.format(shard.layout.text_field)
                found.setdefault((shard.source, suffix, read_as), []).append(file)
    return [Kind(*key, files) for key, files in found.items()]


def draw(data: bytes) -> float:
    """A number in [0, 1) from the SHA-256 of some bytes."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little") / 2**64


# --- documents --------------------------------------------------------------------------


def documents(
    config: DataConfig, tally: Counter[str], shards: Iterable[Shard] | None = None
) -> Iterator[Document]:
    """Every document that holds more than white space, in reading order; of all shards or some.

    Counts in `tally` what it leaves out, by reason, and the characters it replaces. Raises
    InputError, naming the place, for a document that is not text, unless data.on_bad_document
    is "skip".
    """
    for shard in plan(config) if shards is None else shards:
        for file, start, stop in shard.pieces:
            for record in format_of(file).read(file, shard.layout, start, stop):
                if not isinstance(record, Found):
                    if isinstance(record, Bad) and config.on_bad_document == "stop":
                        place = Place(file, shard.layout, record.offset)
                        raise InputError(f"{place}: {record.message}")
                    tally[record.reason] += 1
                elif _is_blank(record.data):
                    tally["empty"] += 1
                else:
                    if record.replaced:
                        tally[REPLACED] += record.replaced
                    yield Document(Place(file, shard.layout, record.offset), record.data)


def _is_blank(data: bytes) -> bool:
    """Whether a text is white space alone; most show at their first byte that it is not."""
    return not (data and 0x20 < data[0] < 0x80) and not data.decode().strip()


def split_documents(config: DataConfig, tally: Counter[str]) -> Iterator[tuple[Side, Document]]:
    """Every document with its side. Raises InputError if one side, or both, stay empty."""
    train_bytes = 0
    if config.split == "tail":
        train_bytes = tail_boundary(sum(len(d.data) for d in documents(config, Counter())), config)
    counts = Counter[Side]()
    for side, document in sides(documents(config, tally), config, train_bytes):
        counts[side] += 1
        yield side, document
    require_both_sides(counts["train"], counts["valid"], config)


def sides(
    found: Iterable[Document], config: DataConfig, train_bytes: int
) -> Iterator[tuple[Side, Document]]:
    """Documents dealt to training and validation by data.split.

    "hash": by the SHA-256 of the text, so a document keeps its side when others come or go, and
    exact duplicates stay together. "tail": the bytes from `train_bytes` on are for validation;
    the document that holds this place is cut, at a line break where there is one.
    """
    if config.split == "hash":
        for document in found:
            yield ("valid" if draw(document.data) < config.valid_fraction else "train"), document
        return
    for place, data in found:
        cut = _cut_position(data, train_bytes)
        if cut > 0:
            yield "train", Document(place, data[:cut])
        if cut < len(data):
            yield "valid", Document(place, data[cut:])
        train_bytes -= len(data)


def tail_boundary(n_bytes: int, config: DataConfig) -> int:
    """How many bytes of a text are for training if its tail is held out."""
    return int(n_bytes * (1 - config.valid_fraction))


def require_both_sides(n_train: int, n_valid: int, config: DataConfig) -> None:
    """Raise InputError unless there are documents for training and for validation."""
    if n_train == n_valid == 0:
        raise InputError(f"data.path = {config.path}: no text")
    for side, n_documents in (("train", n_train), ("valid", n_valid)):
        if n_documents == 0:
            raise InputError(
                f"the {side} split has no documents; change data.valid_fraction, set data.split: "
                "tail (for one file or a few), cut the text with data.separator, or add text"
            )


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
