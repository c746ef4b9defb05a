"""List the files of a folder: those that DVC watches, or those that a listing names.

    python -m lm.prepare.listing /data/corpus corpus.listing      # then data.path: corpus.listing

A listing stands for a folder that is too large to be hashed. It names every file with its size and
time of change; a file that differs in one of them is an error. The text itself is hashed when it is
read, for the key of its shard.
"""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from lm.base.errors import InputError, one_line_errors
from lm.base.files import atomic_write, read_json

SUFFIX = ".listing"
FORMAT = 1
MAX_BYTES = 1 << 30  # of a listing: some ten million files
Entry = os.DirEntry[str]


def write_listing(root: Path, file: Path) -> int:
    """List the files of a folder, except hidden ones; return their number."""
    if not root.is_dir():
        raise InputError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}")
    if file.suffix != SUFFIX:
        raise InputError(f"{file}: the name of a listing must end in {SUFFIX}")
    if file.resolve().is_relative_to(root.resolve()):
        raise InputError(f"{file}: lies in the folder that it lists; write it elsewhere")
    files = _found(root)
    listing = {"format": FORMAT, "root": str(root.absolute()), "files": files}
    # ASCII only: names that are not UTF-8 are escaped
    atomic_write(file, json.dumps(listing, indent=2).encode() + b"\n")
    return len(files)


def listed_folder(file: Path) -> Path:
    """Return the folder that a listing describes. Raises InputError if a file has changed."""
    match read_json(file, MAX_BYTES):
        case {"format": int(), "root": str(folder), "files": dict(listed)}:
            root = Path(folder)
        case _:
            raise InputError(
                f"{file}: not a listing; make one: python -m lm.prepare.listing FOLDER {file}"
            )
    if not root.is_dir():
        raise InputError(f"{file}: lists {root}, which is not a folder here; make it again")
    found, again = _found(root), f"make it again: python -m lm.prepare.listing {root} {file}"
    for name in sorted(found.keys() | listed.keys()):
        before, now = listed.get(name), found.get(name)
        if before != now:
            what = "is gone" if now is None else "is new" if before is None else "has changed"
            raise InputError(f"{root / name}: {what} since {file} was made; {again}")
    return root


def _found(root: Path) -> dict[str, Any]:
    """Return size and time of change, in nanoseconds, of every file by its path in the folder."""
    at, found = len(f"{root}/"), {}
    for entry in chain.from_iterable(visible(entries) for _, entries in walk(root)):
        if is_file(entry):
            status = entry.stat()
            found[entry.path[at:]] = [status.st_size, status.st_mtime_ns]
    return dict(sorted(found.items()))


def walk(root: Path) -> Iterator[tuple[str, list[Entry]]]:
    """Yield each folder from `root` down with its entries; the caller may remove some of these.

    Enters no hidden folder and no link. Raises OSError for a folder that cannot be read; os.walk
    and Path.rglob skip it silently.
    """
    folders = [str(root)]
    while folders:
        folder = folders.pop()
        with os.scandir(folder) as found:
            entries = list(found)
        yield folder, entries
        folders += [e.path for e in visible(entries) if e.is_dir(follow_symlinks=False)]


def is_file(entry: Entry) -> bool:
    """Return whether an entry is a file or a link to one; a circular link is not."""
    return Path(entry.path).is_file() if entry.is_symlink() else entry.is_file()


def visible(entries: list[Entry]) -> Iterator[Entry]:
    """Return the entries that are not hidden."""
    return (entry for entry in entries if not entry.name.startswith("."))


# --- the files that DVC watches ---------------------------------------------------------


def watched(root: Path, left_out: Counter[str]) -> Iterator[Entry]:
    """Yield the entries that DVC watches, except hidden ones; count the others in `left_out`.

    Raises InputError for an entry that DVC would refuse without naming it or the remedy.
    """
    path = _absolute(root)
    inside = path.is_relative_to(Path.cwd())  # elsewhere DVC hides nothing
    ignores = _ignores(path) if inside else None
    for folder, entries in walk(root):
        names = {entry.name for entry in entries}
        n_visible = sum(1 for _ in visible(entries))
        left_out["names that begin with a dot"] += len(entries) - n_visible
        if ignores is not None:
            folders = [entry.name for entry in entries if Path(entry.path).is_dir()]
            kept = set(chain(*ignores(folder, folders, list(names.difference(folders)))))
            entries[:] = [entry for entry in entries if entry.name in kept]
        elif inside and ".dvc" in names:
            entries.clear()  # another DVC project
        left_out["hidden from DVC"] += n_visible - sum(1 for _ in visible(entries))
        for entry in entries:
            try:
                entry.name.encode()
            except UnicodeEncodeError:
                raise InputError(
                    f"{str(os.fsencode(entry.path))[2:-1]}: a name that is not UTF-8, which DVC "
                    "cannot record; rename it, or make a listing of the folder (docs/SCALE.md)"
                ) from None
            if entry.name == ".dvcignore":
                raise InputError(
                    f"{entry.path}: DVC allows none in a folder that it hashes; move its lines to "
                    ".dvcignore in the project's root folder"
                )
        yield from visible(entries)


def is_hidden_from_dvc(file: Path) -> bool:
    """Return whether DVC ignores this file when it hashes a folder above it."""
    folder = _absolute(file.parent)
    ignores = _ignores(folder) if folder.is_relative_to(Path.cwd()) else None
    return ignores is not None and not any(ignores(str(folder), [], [file.name]))


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 - as in DVC, links are not followed


def _ignores(path: Path) -> Callable[..., tuple[list[str], list[str]]] | None:
    """Return DVC's own filter, or None if no .dvcignore and no project above hides any file."""
    parts = path.relative_to(Path.cwd()).parts
    above = [path, *path.parents][: len(parts) + 1]
    is_nested = any((folder / ".dvc").exists() for folder in above[:-1])
    lines = [
        (line, path.relative_to(folder).parts[:1])
        for folder in above
        if (file := folder / ".dvcignore").is_file()
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    # lines such as /.venv matter only in a hidden folder: hidden entries are not read anyway
    idle = ("#",) if any(part.startswith(".") for part in parts) else ("#", "/.")
    if not is_nested and all(
        not line.strip() or line.startswith(idle) or _is_of_another(line, first)
        for line, first in lines
    ):
        return None
    from dvc.fs import localfs  # takes a second
    from dvc.ignore import DvcIgnoreFilter

    ignores: Callable[..., tuple[list[str], list[str]]] = DvcIgnoreFilter(localfs, str(Path.cwd()))
    return ignores


def _is_of_another(line: str, first: tuple[str, ...]) -> bool:
    """Return whether a line such as /lm/**/x names another folder than the path's `first`."""
    named = re.match(r"/([\w-]+)/", line)
    return named is not None and first not in ((), (named[1],))


if __name__ == "__main__":
    with one_line_errors():
        if len(sys.argv) != 3:
            raise InputError(f"expected: python -m lm.prepare.listing FOLDER NAME{SUFFIX}")
        print(f"{write_listing(Path(sys.argv[1]), Path(sys.argv[2])):,} files")  # noqa: T201
