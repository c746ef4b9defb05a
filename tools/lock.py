"""Check, without any data, that dvc.lock is of this code and these settings: for a fresh clone.

`dvc repro --dry --allow-missing` ends with 0 even if it would run something, and `dvc status` calls
everything changed where the outputs were not pulled yet.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dvc.repo import Repo

from lm.base.console import say
from lm.base.errors import InputError, one_line_errors
from lm.base.params import parse_yaml
from tools.repository import opened

LOCK = Path("dvc.lock")
ABSENT = ("deleted", "not in cache")  # not pulled yet: no sign of a change


def changes(repo: Repo) -> Iterator[str]:
    """Yield the code, settings and commands that have changed since dvc.lock was written."""
    for stage, entries in repo.status().items():
        for entry in entries:
            if isinstance(entry, str):  # "changed command"
                yield f"stage {stage}: {entry}"
                continue
            for found in entry.values():
                yield from (f"{name}: {what}" for name, what in _flat(found) if what not in ABSENT)


def gaps(repo: Repo) -> Iterator[str]:
    """Yield where dvc.lock does not fit dvc.yaml, the files that git has, or itself."""
    recorded, names = recorded_hashes(), {stage.name for stage in repo.index.stages if stage.cmd}
    for name in sorted(recorded.keys() - names):
        yield f"stage {name}: is only in {LOCK}"
    made = {str(out): out.hash_info.value for stage in repo.index.stages for out in stage.outs}
    for stage in repo.index.stages:
        if not stage.cmd:  # a .dvc file
            continue
        if stage.name not in recorded:
            yield f"stage {stage.name}: never ran"
            continue
        hashes = recorded[stage.name]
        for kind, files in (("deps", stage.deps), ("outs", stage.outs)):
            names = {str(file) for file in files if not hasattr(file, "params")}
            for path in sorted(names ^ hashes[kind].keys()):
                yield f"stage {stage.name}: {path} is only in one of dvc.yaml and {LOCK}"
        for path, md5 in hashes["deps"].items():
            if made.get(path, md5) != md5:
                yield f"stage {stage.name}: recorded with another {path} than was made"
            inside = not Path(path).is_absolute() and ".." not in Path(path).parts
            if path not in made and inside and not Path(path).exists():
                yield f"{path}: deleted"


def _flat(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield name and change; a file of settings has both for each of its sections."""
    for name, what in found.items():
        if isinstance(what, dict):
            yield from ((f"{name}: {section}", change) for section, change in _flat(what))
        else:
            yield name, what


def stages_of(file: Path) -> dict[str, Any]:
    """Return the stages of dvc.yaml or dvc.lock; none if it has no key `stages`.

    Raises InputError for a file that is not YAML or not of DVC's form.
    """
    try:
        return dict(parse_yaml(file.read_text(encoding="utf-8"), str(file)).get("stages", {}))
    except InputError as error:
        raise InputError(f"{error}{_restore(file)}") from None
    except (AttributeError, TypeError, ValueError):
        raise InputError(f"{file}: not of DVC's form{_restore(file)}") from None


def _restore(file: Path) -> str:
    return f"; `git checkout {file}` brings back the committed one"


def recorded_hashes() -> dict[str, dict[str, dict[str, str]]]:
    """Return md5 by path of the "deps" and "outs" of each stage in dvc.lock."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for name, stage in stages_of(LOCK).items():
        try:
            found[name] = {
                kind: {entry["path"]: entry["md5"] for entry in stage.get(kind, [])}
                for kind in ("deps", "outs")
            }
        except (LookupError, TypeError, AttributeError):
            raise InputError(f"{LOCK}: stage {name}: not of DVC's form{_restore(LOCK)}") from None
    return found


def faults() -> list[str]:
    """Return why dvc.lock is stale, if it is. Raises InputError if a file cannot be read."""
    if not LOCK.is_file():
        raise InputError(f"{LOCK}: no such file; run `make repro` and commit it")
    with opened() as repo:
        return list(dict.fromkeys([*gaps(repo), *changes(repo)]))


if __name__ == "__main__":
    with one_line_errors():
        if found := faults():
            shown = [*found[:5], *([f"{len(found) - 5} more"] if len(found) > 5 else [])]
            raise InputError(f"{LOCK} is stale: {'; '.join(shown)}; run `make repro` and commit it")
        say(f"{LOCK} is of this code and these settings")
