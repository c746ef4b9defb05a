"""The manifest beside a checkpoint: sizes and hashes. A checkpoint without one does not count.

last.safetensors   written first
last.json          its rename is the commit
"""

import shutil
from pathlib import Path
from typing import Any

from lm.base.errors import InputError
from lm.base.files import read_json, require_file, sha256_file, write_json
from lm.machine.processes import ALONE, Processes


def commit(path: Path) -> None:
    """Write the manifest of a checkpoint that is on disk: from now on the checkpoint counts."""
    write_json(path.with_suffix(".json"), size_and_hash(path))


def size_and_hash(file: Path) -> dict[str, Any]:
    """Return the size and the hash of a file, for a manifest."""
    return {"size_bytes": file.stat().st_size, "sha256": sha256_file(file)}


def verify(path: Path, processes: Processes = ALONE) -> None:
    """Raise InputError unless a checkpoint, a file or a folder, is what its manifest describes.

    Several processes divide the files of a folder: the folder is intact if none of them raises.
    """
    file = path.with_suffix(".json")
    if not path.is_dir():
        require_file(path)
    if not file.exists():
        raise InputError(f"{path}: no manifest {file.name} beside it")
    files = read_json(file)
    if path.is_dir():
        files = files.get("files") if isinstance(files, dict) else None
    else:
        files = {"": files}  # the path itself
    if not isinstance(files, dict) or not all(map(_is_description, files.values())):
        kind = "checkpoint in a folder" if path.is_dir() else "checkpoint"
        raise InputError(f"{file}: not the manifest of a {kind}")
    names = sorted(files)
    if path.is_dir() and (odd := sorted({f.name for f in path.iterdir()} ^ set(names))):
        raise InputError(f"{path / odd[0]}: missing, or not in the manifest")
    for name in names[processes.rank :: processes.size]:
        found, described = (path / name).stat().st_size, files[name]
        if found != described["size_bytes"]:
            raise InputError(
                f"{path / name}: {found} bytes, its manifest says {described['size_bytes']}"
            )
        if sha256_file(path / name) != described["sha256"]:
            raise InputError(f"{path / name}: content differs from the hash in its manifest")


def _is_description(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and type(value.get("size_bytes")) is int
        and isinstance(value.get("sha256"), str)
    )


def discard(path: Path) -> None:
    """Delete a checkpoint if it exists, its manifest first: a half-deleted one must not count."""
    path.with_suffix(".json").unlink(missing_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
