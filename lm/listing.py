"""A folder too large to be hashed, as a small file that DVC can watch in its place.

    python -m lm.listing /data/corpus corpus.listing      then data.path: corpus.listing

It names every file with its size and time of change, and nothing is read through it unless they
still are as it says. The text itself is hashed where it is read: by the key of its shard.
"""

import sys
from pathlib import Path
from typing import Any

from lm.errors import InputError, one_line_errors
from lm.files import read_json, write_json

SUFFIX = ".listing"
FORMAT = 1


def write_listing(root: Path, file: Path) -> int:
    """List the files of a folder, hidden ones left out; returns how many there are."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    if file.suffix != SUFFIX:
        raise InputError(f"{file}: the name of a listing ends in {SUFFIX}")
    files = _found(root)
    write_json(file, {"format": FORMAT, "root": str(root.absolute()), "files": files})
    return len(files)


def listed_folder(file: Path) -> Path:
    """The folder that a listing describes. Raises InputError if it is not as it was."""
    listing = read_json(file)
    if not (
        isinstance(listing, dict)
        and isinstance(listing.get("root"), str)
        and isinstance(listing.get("files"), dict)
    ):
        raise InputError(f"{file}: not a listing; make one by python -m lm.listing FOLDER {file}")
    root = Path(listing["root"])
    found, again = _found(root), f"make it again: python -m lm.listing {root} {file}"
    for name in sorted(found.keys() | listing["files"].keys()):
        before, now = listing["files"].get(name), found.get(name)
        if before != now:
            what = "is gone" if now is None else "is new" if before is None else "has changed"
            raise InputError(f"{root / name}: {what} since {file} was made; {again}")
    return root


def _found(root: Path) -> dict[str, Any]:
    """Size and time of change, in nanoseconds, of every file by its path in the folder."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            status = path.stat()
            found[name.as_posix()] = [status.st_size, status.st_mtime_ns]
    return found


if __name__ == "__main__":
    with one_line_errors():
        if len(sys.argv) != 3:
            raise InputError(f"expected: python -m lm.listing FOLDER NAME{SUFFIX}")
        print(f"{write_listing(Path(sys.argv[1]), Path(sys.argv[2])):,} files")  # noqa: T201
