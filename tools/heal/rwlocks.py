"""DVC's lists of who reads and writes what: .dvc/tmp/rwlock, and one of its experiments."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm.base.files import atomic_write
from tools.heal.project import Project, locked


def heal_rwlocks(project: Project) -> Iterator[str]:
    """Remove unreadable lists of who reads and writes what, and entries that would block DVC.

    DVC refuses every command while such a list is unreadable, or names a living pid: that of a
    zombie, or of another program that was given the number of a killed DVC. Entries of pids that
    are gone DVC removes itself where they are in its way: they may live in another container.
    """
    for path in (project.tmp / "rwlock", project.experiments / "rwlock"):
        if not path.exists() or path.read_bytes() == b"{}":
            continue
        with locked(path.with_name("rwlock.lock")) as free:  # DVC's own guard, held for an instant
            if not free:
                continue
            name = path.relative_to(project.root)
            entries = read_rwlock(path)
            if entries is None:
                path.unlink()
                yield f"{name} was torn: removed"
                continue
            dead = sorted({e["pid"] for e in holders(entries) if not is_held(project, e, path)})
            if path.parent == project.tmp:
                import psutil

                dead = [pid for pid in dead if psutil.pid_exists(pid)]
            if dead:
                alive = without(entries, dead)
                atomic_write(path, json.dumps(alive).encode(), durable=False)
                yield f"{name}: removed the entries of dead processes {', '.join(map(str, dead))}"


def has_dead_claim(project: Project) -> bool:
    """Return whether a DVC ended and left its claims to read and write."""
    path = project.tmp / "rwlock"
    entries = read_rwlock(path) or {}
    return any(not is_held(project, holder, path) for holder in holders(entries))


def read_rwlock(path: Path) -> dict[str, Any] | None:
    """Return the list, or None unless it has the form that DVC wants (dvc.rwlock.SCHEMA)."""
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_bytes())
        if not entries.keys() <= {"read", "write"}:
            return None
        for holder in holders(entries):
            if not isinstance(holder["pid"], int) or not isinstance(holder["cmd"], str):
                return None
    except (ValueError, AttributeError, TypeError, KeyError):
        return None
    return dict(entries)


def holders(entries: dict[str, Any]) -> list[dict[str, Any]]:
    """Return who reads or writes, {"pid": ..., "cmd": ...}, once for each path."""
    readers = [holder for several in entries.get("read", {}).values() for holder in several]
    return readers + list(entries.get("write", {}).values())


def is_held(project: Project, holder: dict[str, Any], listed_in: Path) -> bool:
    """Return whether the process of an entry lives and may be the DVC that made it.

    One that is no Python, or that began after the list was written, has only inherited the number.
    """
    import psutil

    try:
        process = psutil.Process(holder["pid"])
        words = process.cmdline()
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        if holder["cmd"] in " ".join(words):
            return True
        is_dvc = "dvc" in [Path(word).name for word in words[:3]]
        if is_dvc and Path(process.cwd()).is_relative_to(project.root):
            return True
        if (program := process.exe()) and "python" not in Path(program).name:
            return False
        return process.create_time() < listed_in.stat().st_mtime + 1  # as exact as it is
    except psutil.AccessDenied:
        return True
    except psutil.NoSuchProcess:
        return False


def without(entries: dict[str, Any], dead: list[int]) -> dict[str, Any]:
    """Return the list without the entries of some processes."""
    read = {
        path: left
        for path, several in entries.get("read", {}).items()
        if (left := [holder for holder in several if holder["pid"] not in dead])
    }
    write = {p: h for p, h in entries.get("write", {}).items() if h["pid"] not in dead}
    return {kind: left for kind, left in (("read", read), ("write", write)) if left}
