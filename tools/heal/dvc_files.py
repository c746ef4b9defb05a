"""Repair what DVC writes in place: dvc.lock and its lists of readers and writers, the rwlocks.

While one of them is cut off, every dvc command fails.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lm.base.files import atomic_write
from tools.heal.project import Project, locked

MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")


def heal_dvc_lock(project: Project) -> Iterator[str]:
    """Replace a dvc.lock that is cut off by git's; DVC's run cache fills in what that lacks.

    Keep the old one: perhaps an editor only left out its last line break.
    """
    path = project.root / "dvc.lock"
    with locked(project.tmp / "lock") as free:  # DVC holds it whenever it may write dvc.lock
        if not free or not path.exists() or not (fault := fault_of_dvc_lock(path.read_bytes())):
            return
        kept = project.tmp / "dvc.lock.torn"
        shutil.copyfile(path, kept)
        committed = f"{project.git('show', 'HEAD:./dvc.lock') or ''}\n".encode()
        if committed != b"\n" and fault_of_dvc_lock(committed) is None:
            atomic_write(path, committed, durable=False)
            cure = "restored from git"
        else:
            path.unlink()
            cure = "removed, DVC writes it again"
        where = kept.relative_to(project.root)
        yield f"dvc.lock was torn ({fault}): {cure}; the torn file is kept as {where}"


def fault_of_dvc_lock(content: bytes) -> str | None:
    """Return the sign that a dvc.lock was not written to its end, or None.

    What is left can be valid YAML: a short hash, a size with fewer digits, an entry without its
    size. So look at the last entry. Leave a merge conflict to the user.
    """
    if re.search(rb"^(<<<<<<<|=======|>>>>>>>)", content, re.MULTILINE):
        return None
    if not content.endswith(b"\n"):
        return "it ends within a line" if content else "empty"
    try:
        lock = yaml.load(content, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
        if lock["schema"] != "2.0":
            return "no schema"
        for name, stage in [*lock.get("stages", {}).items()][-1:]:
            last = list(stage)[-1]
            if "cmd" not in stage or (last in ("deps", "outs") and not is_whole(stage[last][-1])):
                return f"stage {name} is unfinished"
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, LookupError, TypeError):
        return "not in DVC's format"
    return None


def is_whole(entry: dict[str, Any]) -> bool:
    """Return whether a dependency or output has all that DVC writes for it."""
    if "md5" not in entry:  # outside of the project: an etag, a checksum or a list of files
        return list(entry)[-1] not in ("path", "hash")
    folder = MD5.fullmatch(str(entry["md5"]))
    return folder is not None and "size" in entry and (not folder[1] or "nfiles" in entry)


def heal_rwlocks(project: Project) -> Iterator[str]:
    """Remove unreadable lists of readers and writers, and entries that would block DVC.

    DVC refuses every command while such a list is unreadable or names a living pid, which may be a
    zombie, or another program that got the number of a killed DVC. Leave the entry of a pid that
    is gone: its process may live in another container, and DVC removes the entry if it must.
    """
    for path in (project.tmp / "rwlock", project.experiments / "rwlock"):
        with locked(path.with_name("rwlock.lock")) as free:  # DVC's own guard, held for an instant
            if not free:
                continue
            name = path.relative_to(project.root)
            entries = read_rwlock(path)
            if entries is None:
                path.unlink()
                yield f"{name} was torn: removed"
                continue
            dead = dead_claims(path)
            if path.parent == project.tmp and dead:
                import psutil

                dead = [pid for pid in dead if psutil.pid_exists(pid)]
            if dead:
                atomic_write(path, json.dumps(without(entries, dead)).encode(), durable=False)
                yield f"{name}: removed the entries of dead processes {', '.join(map(str, dead))}"


def read_rwlock(path: Path) -> dict[str, Any] | None:
    """Return the list, or None if it is not in DVC's format (dvc.rwlock.SCHEMA)."""
    if not path.exists():
        return {}
    try:
        entries: dict[str, Any] = json.loads(path.read_bytes())
        fit = [type(c["pid"]) is int and type(c["cmd"]) is str for c in claims(entries)]
        return entries if all(fit) and entries.keys() <= {"read", "write"} else None
    except (ValueError, AttributeError, TypeError, KeyError):
        return None


def claims(entries: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the claims to read or write, {"pid": ..., "cmd": ...}, once for each path."""
    readers = [claim for several in entries.get("read", {}).values() for claim in several]
    return readers + list(entries.get("write", {}).values())


def dead_claims(path: Path) -> list[int]:
    """Return the pids in a list that are no longer the DVC that made the claim."""
    return sorted({c["pid"] for c in claims(read_rwlock(path) or {}) if not is_held(c, path)})


def is_held(claim: dict[str, Any], listed_in: Path) -> bool:
    """Return whether the process of a claim lives and may be the DVC that made it.

    A process that is no Python, or that began after the list was written, only got its number.
    """
    import psutil

    try:
        process = psutil.Process(claim["pid"])
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        if claim["cmd"] in " ".join(process.cmdline()):
            return True
        program = Path(process.exe()).name  # empty if it is not known
        may_be_dvc = not program or "python" in program.lower() or "dvc" in program
        return may_be_dvc and process.create_time() < listed_in.stat().st_mtime + 1
    except psutil.AccessDenied:
        return True
    except psutil.NoSuchProcess:
        return False


def without(entries: dict[str, Any], dead: list[int]) -> dict[str, Any]:
    """Return the list without the entries of some processes."""
    read = {
        path: left
        for path, several in entries.get("read", {}).items()
        if (left := [claim for claim in several if claim["pid"] not in dead])
    }
    write = {p: c for p, c in entries.get("write", {}).items() if c["pid"] not in dead}
    return {kind: left for kind, left in (("read", read), ("write", write)) if left}
