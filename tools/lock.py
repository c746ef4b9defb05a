"""Check that dvc.lock belongs to this code and these settings. Needs no data: for a fresh clone.

DVC has no such check: `dvc repro --dry --allow-missing` exits with 0 even if it would run a stage,
and `dvc status` reports every output as changed that was not pulled yet.
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
    """Yield each contradiction of dvc.lock to dvc.yaml, to the files in git, or to itself."""
    recorded, names = recorded_hashes(), {stage.name for stage in repo.index.stages if stage.cmd}
    for name in sorted(recorded.keys() - names):
        yield f"stage {name}: in {LOCK}, but not in dvc.yaml"
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
                yield f"stage {stage.name}: read another {path} than the recorded output"
            inside = not Path(path).is_absolute() and ".." not in Path(path).parts
            if path not in made and inside and not Path(path).exists():
                yield f"{path}: deleted"


def _flat(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (name, change); of a file of settings, one for each changed section."""
    for name, what in found.items():
        if isinstance(what, dict):
            yield from ((f"{name}: {section}", change) for section, change in _flat(what))
        else:
            yield name, what


def stages_of(file: Path) -> dict[str, Any]:
    """Return the stages of dvc.yaml or dvc.lock; none if it has no key `stages`.

    Raises InputError for a file that is not YAML or not in DVC's format.
    """
    try:
        return dict(parse_yaml(file.read_text(encoding="utf-8"), str(file)).get("stages", {}))
    except InputError as error:
        raise InputError(f"{error}{_restore(file)}") from None
    except (AttributeError, TypeError, ValueError):
        raise InputError(f"{file}: not in DVC's format{_restore(file)}") from None


def _restore(file: Path) -> str:
    return f"; `git checkout {file}` restores the committed one"


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
            raise InputError(f"{LOCK}: stage {name}: not in DVC's format{_restore(LOCK)}") from None
    return found


def faults() -> list[str]:
    """Return the reasons why dvc.lock is stale. Raises InputError if a file cannot be read."""
    if not LOCK.is_file():
        raise InputError(f"{LOCK}: no such file; run `make repro` and commit it")
    with opened() as repo:
        return list(dict.fromkeys([*gaps(repo), *changes(repo)]))


if __name__ == "__main__":
    with one_line_errors():
        if found := faults():
            shown = [*found[:5], *([f"{len(found) - 5} more"] if len(found) > 5 else [])]
            raise InputError(f"{LOCK} is stale: {'; '.join(shown)}; run `make repro` and commit it")
        say(f"{LOCK} belongs to this code and these settings")
