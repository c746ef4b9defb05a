"""Is dvc.lock of this code and these settings? Needs no data, so that a fresh clone can tell.

`dvc repro --dry --allow-missing` ends with 0 even if it would run something, and `dvc status` calls
everything changed where the outputs were not pulled yet.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from dvc.repo import Repo

from lm.console import say
from lm.errors import InputError, one_line_errors

LOCK = Path("dvc.lock")
ABSENT = ("deleted", "not in cache")  # not pulled yet: no sign of a change


def changes(repo: Repo) -> Iterator[str]:
    """What of code, settings and commands has changed since dvc.lock was written."""
    for stage, entries in repo.status().items():
        for entry in entries:
            if isinstance(entry, str):  # "changed command"
                yield f"stage {stage}: {entry}"
                continue
            for found in entry.values():
                yield from (f"{name}: {what}" for name, what in _flat(found) if what not in ABSENT)


def gaps() -> Iterator[str]:
    """Where dvc.lock does not fit together: a stage was recorded with another's earlier output."""
    stages = yaml.safe_load(LOCK.read_text())["stages"]
    made = {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", [])}
    for name, stage in stages.items():
        for dep in stage.get("deps", []):
            if made.get(dep["path"], dep["md5"]) != dep["md5"]:
                yield f"stage {name}: recorded with another {dep['path']} than was made"


def _flat(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and change; a file of settings has both for each of its sections."""
    for name, what in found.items():
        if isinstance(what, dict):
            yield from ((f"{name}: {section}", change) for section, change in _flat(what))
        else:
            yield name, what


if __name__ == "__main__":
    with one_line_errors():
        if not LOCK.is_file():
            raise InputError(f"{LOCK}: no such file; run `make repro` and commit it")
        if found := dict.fromkeys([*changes(Repo()), *gaps()]):
            raise InputError(f"{LOCK} is stale: {'; '.join(found)}; run `make repro` and commit it")
        say(f"{LOCK} is of this code and these settings")
