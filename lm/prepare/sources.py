"""Find the files of the user's text: data.path and data.sources.

The order is fixed: sources as params.yaml lists them, files by path. Files left out are counted.
"""

import re
from collections import Counter, deque
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, NamedTuple

from lm.base.errors import InputError
from lm.base.paths import METRICS, MODELS, TOKENIZER, TOKENS
from lm.base.sections import INSIDE_ONE, NOT_EMPTY, POSITIVE, Bound, Count
from lm.prepare import limits, listing
from lm.prepare.records import ReadOptions

ONE_SOURCE = "text"  # the name of all text, without data.sources
SOURCE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")  # becomes part of file names
OUTPUTS = (TOKENIZER, TOKENS, METRICS, MODELS)  # of the stages, which must not read them as text
REPLACES = {"strict": False, "replace": True}  # by data.encoding_errors
SHORTEST_SHARD = Bound(lambda x: x >= 1 << 16, f"must be >= {1 << 16}")


@dataclass(frozen=True)
class SourceConfig:
    """One of `data.sources`: a part of the text."""

    path: Annotated[str, NOT_EMPTY]  # in data.path: a file, a folder or a pattern
    text_field: str  # the field of JSON objects, the column of tables
    weight: Annotated[float, POSITIVE] | None  # share of the training windows; null: by size


@dataclass(frozen=True)
class DataConfig:
    """The section `data`: which text, and how it is split."""

    path: Annotated[
        str,
        NOT_EMPTY,
        "the text: a file, a folder or a listing (docs/SCALE.md); `data/raw` is the default text",
    ]
    glob: Annotated[str, "pattern of the files to read in the folder"]
    text_field: Annotated[str, "the field of JSON objects, the column of tables"]
    sources: Annotated[
        dict[str, SourceConfig] | None,
        "parts of `data.path` (a file, folder or pattern in it), each with its share of the "
        "training windows (weight null: by size); null: all text is one source",
    ]
    separator: Annotated[
        Annotated[str, NOT_EMPTY] | None,
        'cuts text files into documents, e.g. `<|endoftext|>`, or `"\\n\\n"` in double quotes; '
        "one file at least must hold it; null: one document per file",
    ]
    encoding_errors: Annotated[
        Literal["strict", "replace"],
        "NUL and bytes that are not UTF-8: stop (strict), or replace and count them",
    ]
    on_bad_document: Annotated[
        Literal["stop", "skip"],
        "a document that is not text (null, bad JSON, bad bytes) or too long: stop, or skip it",
    ]
    deduplicate: Annotated[bool, "leave out exact duplicates"]
    split: Annotated[
        Literal["hash", "tail"],
        "hash: by a hash of each document, whatever others come or go; tail: the end of the text",
    ]
    valid_fraction: Annotated[float, INSIDE_ONE, "the share held out for validation"]
    shard_bytes: Annotated[Count, SHORTEST_SHARD, "text in one shard of tokens, about"]
    max_expansion: Annotated[
        Count,
        "stop if a `.gz`, a `.zst` or the column of a parquet table holds more than this many "
        f"times its size (and more than {limits.MAX_DOCUMENT_BYTES >> 20} MiB)",
    ]

    def __post_init__(self) -> None:
        if self.sources is None:
            return
        if not self.sources:
            raise InputError("data.sources = {}: name a source, or set null to make all text one")
        for name in self.sources:
            if not SOURCE_NAME.fullmatch(name):
                raise InputError(
                    f"data.sources.{name}: a source's name is part of file names: a-z, 0-9, - and _"
                )
        without = [name for name, source in self.sources.items() if source.weight is None]
        if 0 < len(without) < len(self.sources):
            raise InputError(
                f"data.sources.{without[0]}.weight = null: give every source a weight, or none"
            )


class SourceFiles(NamedTuple):
    """The files of one source, and how they are read."""

    name: str
    files: list[Path]
    options: ReadOptions
    left_out: Counter[str]  # files that are not read, by reason


def find_sources(config: DataConfig) -> list[SourceFiles]:
    """Return the sources with their files: all that DVC watches, except hidden ones.

    Raises InputError if there is no file, and for a pipe, a device or a link to a folder: reading
    a pipe or a device may never end, and DVC does not watch files behind a link to a folder.
    """
    separator = None if config.separator is None else config.separator.encode()
    replaces = REPLACES[config.encoding_errors]
    options = ReadOptions(config.text_field, separator, replaces, config.max_expansion)
    root = text_root(config)
    is_listed = root != Path(config.path)
    for output in OUTPUTS if root.exists() else ():
        place, text = output.resolve(), root.resolve()
        if place.is_relative_to(text) or text.is_relative_to(place):
            raise InputError(
                f"data.path = {config.path}: the stages write {output}; put your text into a "
                "folder of its own and name that"
            )
    if config.sources is None:
        files, left_out = _files(root, config.glob, "data.path", str(root), is_listed)
        return [SourceFiles(ONE_SOURCE, files, options, left_out)]
    if not root.is_dir():
        what = "a file; with data.sources, name the folder that holds them"
        raise InputError(f"data.path = {root}: {what if root.exists() else 'no such folder'}")
    if not is_listed:
        # check all of the folder, since DVC hashes all of it
        deque(listing.watched(root, Counter()), maxlen=0)
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
        if not is_listed and listing.is_hidden_from_dvc(root / within):
            raise InputError(
                f"{key} = {within}: hidden from DVC by .dvcignore or a nested project; name another"
            )
        is_pattern = not (root / within).exists() and set("*?[") & set(source.path)
        folder, pattern = (root, source.path) if is_pattern else (root / within, config.glob)
        files, left_out = _files(folder, pattern, key, source.path, is_listed)
        own_options = replace(options, text_field=source.text_field)
        found.append(SourceFiles(name, files, own_options, left_out))
    return found


def text_root(config: DataConfig) -> Path:
    """Return the file or folder of data.path, or the folder behind a listing."""
    path = Path(config.path)
    return listing.listed_folder(path) if path.suffix == listing.SUFFIX and path.is_file() else path


def find_files(config: DataConfig) -> list[Path]:
    """Return the files of all sources."""
    return [file for source in find_sources(config) for file in source.files]


def weights(config: DataConfig) -> dict[str, float | None]:
    """Return the weight of each source, from the settings alone."""
    if config.sources is None:
        return {ONE_SOURCE: None}
    return {name: source.weight for name, source in config.sources.items()}


def in_words(left_out: Counter[str]) -> str:
    """Return the counts of what is not read in words, by reason."""
    return "; ".join(f"{reason}: {count:,}" for reason, count in sorted((+left_out).items()))


def _files(
    path: Path, pattern: str, key: str, value: str, is_listed: bool
) -> tuple[list[Path], Counter[str]]:
    """Return the file, or the matching files of the folder, and counts of those left out.

    Messages name the setting `key` = `value`. DVC need not watch the files of a listing.
    """
    left_out: Counter[str] = Counter()
    if path.is_file():
        if _is_of_dvc(path.name):
            raise InputError(f"{key} = {value}: a file of DVC's own; name the text itself")
        return [path], left_out
    if not path.is_dir():
        kind = "a pipe or a device; name a file or a folder"
        problem = kind if path.exists() else f"no such file or folder{_advice(value)}"
        raise InputError(f"{key} = {value}: {problem}")
    pattern_key = key if pattern == value else "data.glob"
    wanted = PurePosixPath(pattern).parts
    if not wanted or wanted[0] == "/" or any("**" in part and part != "**" for part in wanted):
        raise InputError(
            f"{pattern_key} = {pattern}: expected a pattern of paths in the folder, as **/*.txt"
        )
    at = len(f"{path}/")
    texts: list[str] = []
    links: list[str] = []
    listed = chain.from_iterable(listing.visible(entries) for _, entries in listing.walk(path))
    for entry in listed if is_listed else listing.watched(path, left_out):
        if entry.is_dir(follow_symlinks=False):
            continue
        if not _matches(tuple(entry.path[at:].split("/")), wanted):
            left_out["links to folders"] += entry.is_symlink() and Path(entry.path).is_dir()
        elif not listing.is_file(entry):
            raise InputError(
                f"{entry.path}: a pipe, a device, a broken link or a link to a folder; remove "
                "it or leave it out by data.glob"
            )
        elif _is_of_dvc(entry.name):
            left_out["files of DVC's own"] += 1
        else:
            (links if entry.is_symlink() else texts).append(entry.path)
    different = _different(sorted(links), texts)
    left_out["links to a text that is read already"] = len(links) - len(different)
    if not texts + different:
        hint = "; braces are not supported, use data.sources" if "{" in pattern else ""
        hint += f"; not read: {in_words(left_out)}" if +left_out else ""
        raise InputError(f"{key} = {value}: no file matches {pattern_key} = {pattern}{hint}")
    return [Path(text) for text in sorted(texts + different)], left_out


def _advice(value: str) -> str:
    """Return a hint for a data.path that names nothing."""
    if set("*?[") & set(value):
        return "; a pattern goes into data.glob"
    if value.startswith("~"):
        return "; only a shell expands ~, write the full path"
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", value):
        return (
            "; a data set of Hugging Face must be downloaded first: "
            f"hf download {value} --repo-type dataset --local-dir FOLDER"
        )
    return ""


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Return whether a path matches a pattern, in which ** stands for any number of folders."""
    match pattern:  # from the end, where most are decided at once
        case ("**",):
            return True
        case (*rest, "**", "**"):
            return _matches(parts, (*rest, "**"))
        case (*rest, "**"):
            return any(_matches(parts[:i], tuple(rest)) for i in range(len(parts) + 1))
        case (*rest, last):
            found = bool(parts) and fnmatchcase(parts[-1], last)
            return found and _matches(parts[:-1], tuple(rest))
        case _:
            return not parts


def _is_of_dvc(name: str) -> bool:
    """Return whether a file of this name is DVC's own."""
    return name.endswith(".dvc") or name in ("dvc.yaml", "dvc.lock")


def _different(links: list[str], texts: list[str]) -> list[str]:
    """Return the links to texts that are not read already, one link for each text.

    Equal texts that DVC stores as links to one file in its cache (cache.type) all count.
    """
    if not links:
        return []
    seen, different = {_identity(text) for text in texts}, []
    for link in links:
        identity = _identity(link)
        if identity not in seen or "/files/md5/" in str(Path(link).readlink()):
            different.append(link)
        seen.add(identity)
    return different


def _identity(file: str) -> tuple[int, int]:
    status = Path(file).stat()
    return status.st_dev, status.st_ino
