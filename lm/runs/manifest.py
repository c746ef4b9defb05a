"""The manifest beside a checkpoint: sizes and hashes of its files. Without it nothing counts.

last.safetensors   written first
last.json          its rename is the commit
"""

import os
import shutil
from pathlib import Path
from typing import Any

from lm.base.errors import InputError
from lm.base.files import read_json, require_file, sha256_file, write_json
from lm.machine.processes import ALONE, Processes


def commit(path: Path) -> None:
    """Write the manifest of a checkpoint that is on disk: from now on it counts."""
    write_json(path.with_suffix(".json"), describe(path))


def describe(file: Path, sync: bool = False) -> dict[str, Any]:
    """Return the size and the hash of a file, for a manifest; `sync` puts it on disk before."""
    if sync:
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
    return {"size_bytes": file.stat().st_size, "sha256": sha256_file(file)}


def verify(path: Path, processes: Processes = ALONE) -> None:
    """Raise InputError unless a checkpoint, a file or a folder, is what its manifest describes.

    Each of several processes hashes some files of a folder: it is sound if none of them raises.
    """
    if path.is_dir():
        _verify_folder(path, processes)
        return
    require_file(path)
    manifest = _manifest(path)
    if not _is_description(manifest):
        raise InputError(f"{path.with_suffix('.json')}: not the manifest of a checkpoint")
    _verify_file(path, manifest)


def _manifest(path: Path) -> Any:
    file = path.with_suffix(".json")
    if not file.exists():
        raise InputError(f"{path}: no manifest {file.name} beside it")
    return read_json(file)


def _is_description(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and type(value.get("size_bytes")) is int
        and isinstance(value.get("sha256"), str)
    )


def _verify_folder(folder: Path, processes: Processes) -> None:
    manifest = _manifest(folder)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not (isinstance(files, dict) and all(map(_is_description, files.values()))):
        file = folder.with_suffix(".json")
        raise InputError(f"{file}: not the manifest of a checkpoint in a folder")
    names = sorted(files)
    if found := sorted({path.name for path in folder.iterdir()} ^ set(names)):
        raise InputError(f"{folder / found[0]}: missing, or not in the manifest")
    for name in names[processes.rank :: processes.size]:
        _verify_file(folder / name, files[name])


def _verify_file(path: Path, manifest: dict[str, Any]) -> None:
    if path.stat().st_size != manifest["size_bytes"]:
        raise InputError(
            f"{path}: {path.stat().st_size} bytes, its manifest says {manifest['size_bytes']}"
        )
    if sha256_file(path) != manifest["sha256"]:
        raise InputError(f"{path}: content differs from the hash in its manifest")


def discard(path: Path) -> None:
    """Delete a checkpoint, if there is one; first its manifest, without which it does not count."""
    path.with_suffix(".json").unlink(missing_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
