"""Write files so that a reader finds the old version or the new one, never a torn one."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm.base.errors import EnvironmentFault, InputError

_CHUNK_BYTES = 1 << 20
MAX_JSON_BYTES = 1 << 28  # of one of our files; parsed, it takes up to twenty times as much
_TOO_LITTLE_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def replacing(path: Path, size_bytes: int | None = None, durable: bool = True) -> Iterator[Path]:
    """Yield a scratch file to write, then rename it to `path`; make the folder of `path`.

    An error, a crash or a power cut leaves the old file or the new one. Without `durable` this
    does not wait for the disk, and a power cut may tear the file. Raises EnvironmentFault if the
    file does not fit on the disk (`size_bytes` is for the message) or cannot be written.
    """
    scratch = path.with_name(path.name + ".tmp")
    with writing(path, size_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield scratch
            if durable:
                sync(scratch)
            scratch.replace(path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
        if durable:
            sync(path.parent)


def atomic_write(path: Path, chunks: bytes | Iterable[bytes], durable: bool = True) -> None:
    """Write bytes to `path`; see `replacing`."""
    with replacing(path, durable=durable) as scratch, open(scratch, "wb") as file:
        for chunk in [chunks] if isinstance(chunks, bytes) else chunks:
            file.write(chunk)


def atomic_copy(source: Path, target: Path) -> None:
    """Copy a file; see `replacing`."""
    with open(source, "rb") as file:
        atomic_write(target, iter(lambda: file.read(_CHUNK_BYTES), b""))


@contextmanager
def writing(path: Path, size_bytes: int | None = None) -> Iterator[None]:
    """Turn an OSError into an EnvironmentFault that names file, cause, needed and free space."""
    try:
        yield
    except OSError as error:
        space = _space(path.parent, size_bytes) if error.errno in _TOO_LITTLE_SPACE else ""
        raise EnvironmentFault(
            f"{path}: {error.strerror or error}{space}; earlier results are intact: fix the "
            "cause and run again"
        ) from None


def _space(folder: Path, size_bytes: int | None) -> str:
    while not folder.exists():
        folder = folder.parent
    needed = "" if size_bytes is None else f"needs {size_bytes / 1e6:,.1f} MB, "
    free = shutil.disk_usage(folder).free
    return f" ({needed}{free / 1e6:,.1f} MB are free in {folder})"


def sync(path: Path) -> None:
    """Force a file, or the renames in a folder, to the disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # never wait for a pipe's writer
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any) -> bytes:
    """Return JSON for people and diffs: two spaces, keys in the order given, a final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any, durable: bool = True) -> None:
    """Write a JSON file; see `replacing`."""
    atomic_write(path, to_json(value), durable)


def require_file(path: Path, remedy: str = "") -> None:
    """Raise InputError unless there is a file: reading a pipe would never end."""
    if not path.is_file():
        problem = "not a file" if path.exists() else f"no such file{remedy}"
        raise InputError(f"{path}: {problem}")


def read_json(path: Path, most: int = MAX_JSON_BYTES) -> Any:
    """Return the content of a JSON file. Raises InputError if it is missing, torn or too long."""
    require_file(path, "; run `dvc repro` to make it")
    if path.stat().st_size > most:
        raise InputError(f"{path}: longer than {most >> 20:,} MiB; run `dvc repro` again")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); run `dvc repro` again") from None


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
