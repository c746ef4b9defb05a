"""dvc.lock, which DVC writes in place: a cut one stops every command."""

import re
import shutil
from collections.abc import Iterator
from typing import Any

import yaml

from lm.base.files import atomic_write
from tools.heal.project import Project, locked

MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")


def heal_dvc_lock(project: Project) -> Iterator[str]:
    """Bring back git's dvc.lock in place of a cut one; what it lacks the run cache fills in.

    The cut one is kept: an editor may have left out the last line break.
    """
    path = project.root / "dvc.lock"
    with locked(project.tmp / "lock") as free:  # DVC holds it whenever it may write dvc.lock
        if not free or not path.exists():
            return
        fault = fault_of_dvc_lock(path.read_bytes())
        if fault is None:
            return
        kept = project.tmp / "dvc.lock.torn"
        shutil.copyfile(path, kept)
        where = f"the torn one is {kept.relative_to(project.root)}"
        committed = project.git("show", "HEAD:./dvc.lock")
        if committed is not None and fault_of_dvc_lock(f"{committed}\n".encode()) is None:
            atomic_write(path, f"{committed}\n".encode(), durable=False)
            yield f"dvc.lock was torn ({fault}): restored from git; {where}"
        else:
            path.unlink()
            yield f"dvc.lock was torn ({fault}): removed, DVC writes it again; {where}"


def fault_of_dvc_lock(content: bytes) -> str | None:
    """Return what shows that a dvc.lock was not written to its end, or None.

    A cut can leave valid YAML: a short hash, a size with fewer digits, an entry without its size.
    So only the last entry can be unfinished. A merge conflict is the user's to resolve.
    """
    if re.search(rb"^(<<<<<<<|=======|>>>>>>>)", content, re.MULTILINE):
        return None
    if not content.endswith(b"\n"):
        return "cut in a line" if content else "empty"
    if content.splitlines()[-1].lstrip().startswith(b"- path:"):
        return "cut after a path"
    try:
        lock = yaml.load(content, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
    except (yaml.YAMLError, UnicodeDecodeError):
        return "not YAML"
    if not isinstance(lock, dict) or not isinstance(lock.get("stages", {}), dict):
        return "no mapping of stages"
    if lock.get("schema") != "2.0":
        return "no schema"
    if list(lock)[-1] != "stages" or not lock["stages"]:
        return None
    name, stage = list(lock["stages"].items())[-1]
    if not isinstance(stage, dict) or "cmd" not in stage:
        return f"stage {name} has no cmd"
    last = list(stage)[-1]
    if last in ("deps", "outs") and not (stage[last] and is_whole(stage[last][-1])):
        return f"stage {name} has an unfinished entry"
    return None


def is_whole(entry: Any) -> bool:
    """Return whether a dependency or output has all that DVC writes for it."""
    if not isinstance(entry, dict) or "path" not in entry:
        return False
    if "md5" not in entry:  # what lies elsewhere has an etag, a checksum or a list of files
        return list(entry)[-1] != "hash"
    folder = MD5.fullmatch(str(entry["md5"]))
    return folder is not None and "size" in entry and (not folder[1] or "nfiles" in entry)
