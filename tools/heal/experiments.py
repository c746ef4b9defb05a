"""Undo what a killed experiment left: a detached HEAD, stashed changes, a task without worker."""

import base64
import json
import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

from tools.heal.dvc_files import claims, dead_claims, read_rwlock
from tools.heal.project import Project, locked

EXEC_REFS = [f"refs/exps/exec/EXEC_{name}" for name in ("BASELINE", "MERGE", "BRANCH")]
REFS_IN = ("for-each-ref", "--format=%(refname)")
EXPERIMENT = re.compile(r"(On .*: )?dvc-exp:[0-9a-f]{40}:[0-9a-f]{40}:")
STASHED = ("log", "-g", "-1", "refs/stash")
SET_UP_SECONDS = 60  # an experiment takes far less to stash the workspace and to detach HEAD
APPLIED = "refs/exps/exec/EXEC_APPLY"
RUN_EXPERIMENT = "dvc.repo.experiments.queue.tasks.run_exp"


def heal_workspace(project: Project) -> Iterator[str]:
    """Restore branch, index and uncommitted changes after a killed `dvc exp run`."""
    if not experiment_died(project) or project.has_living_dvc():
        return
    with locked(project.tmp / "lock") as free:
        if free:
            (project.tmp / "repro.dat").unlink(missing_ok=True)  # its arguments, and a staged file
            yield from drop_git_locks(project)
            began = set_up_at(project)
            yield from reattach_head(project, began)
            yield from return_stash(project, began)
            for ref in [*EXEC_REFS, *(project.git(*REFS_IN, "refs/exps/temp") or "").split()]:
                project.git("update-ref", "--no-deref", "-d", ref)


def experiment_died(project: Project) -> bool:
    """Return whether an experiment was setting up, running in the workspace or being collected."""
    path = project.experiments / "rwlock"
    begun = project.git("rev-parse", "-q", "--verify", EXEC_REFS[0]) is not None
    return begun or read_rwlock(path) is None or bool(dead_claims(path))


def set_up_at(project: Project) -> list[int]:
    """Return when the dead experiment began to change HEAD and stash, a time for each trace."""
    path = project.experiments / "rwlock"
    traces = [folder / EXEC_REFS[0] for folder in project.git_folders()]
    traces += [path] if claims(read_rwlock(path) or {}) else []
    return [int(trace.stat().st_mtime) for trace in traces if trace.exists()]


def happened_then(began: list[int], seconds: str) -> bool:
    """Return whether the experiment did what has this time, not the user later."""
    return seconds.isdigit() and any(-1 <= int(seconds) - t <= SET_UP_SECONDS for t in began)


def drop_git_locks(project: Project) -> Iterator[str]:
    """Remove git's lock files: no git or DVC process is there that could hold them."""
    for folder in project.git_folders():
        for lock in sorted([*folder.glob("*.lock"), *folder.glob("refs/**/*.lock")]):
            lock.unlink()
            yield f"{os.path.relpath(lock, project.root)} was left behind: removed"


def reattach_head(project: Project, began: list[int]) -> Iterator[str]:
    """Switch from the commit that DVC checked out back to the user's branch, as DVC would.

    Leave HEAD where it is if the user has moved or detached it, or moved the branch, since.
    """
    branch = project.git("rev-parse", "--symbolic-full-name", "@{-1}") or ""
    if project.git("symbolic-ref", "-q", "HEAD") or not branch.startswith("refs/heads/"):
        return
    newest = ("log", "-g", "-1", "--format=%gd %gs", "--date=unix", "HEAD")  # HEAD@{SECONDS} WHAT
    when, _, what = (project.git(*newest) or "").removeprefix("HEAD@{").partition("} ")
    if not what.startswith("checkout: ") or not happened_then(began, when):
        return
    commits = [project.git("rev-parse", "-q", "--verify", name) for name in (branch, EXEC_REFS[2])]
    if project.git("rev-parse", "HEAD") in commits:
        name = branch.removeprefix("refs/heads/")
        project.git("symbolic-ref", "-m", f"heal: Restore HEAD to '{name}'", "HEAD", branch)
        project.git("reset", "-q")
        yield f"git's HEAD was left detached by an experiment: back on branch {name}"


def return_stash(project: Project, began: list[int]) -> Iterator[str]:
    """Restore the user's changes, which DVC keeps in git's stash while it sets up an experiment.

    First stash the workspace, if it is not clean. Keep a stash with a message of its own, with
    untracked files or of another time: the user made it.
    """
    while EXPERIMENT.match(project.git(*STASHED, "--format=%s") or ""):
        project.git("stash", "drop", "-q")
        yield "an experiment was left in git's stash: dropped"
    entries = read_rwlock(project.experiments / "rwlock") or {}
    if "workspace" not in entries.get("write", {}):
        return
    stashed = project.git(*STASHED, "--format=%ct %s") or ""
    stashed_at, _, message = stashed.partition(" ")
    if not happened_then(began, stashed_at) or not message.startswith("WIP on "):
        return
    if project.git("rev-parse", "-q", "--verify", "stash@{0}^3") is not None:
        return
    if project.git("diff", "--quiet", "stash@{0}") is not None:
        yield "git's newest stash equals the workspace: kept, it may be yours"
        return
    kept, place = "", "stash@{0}"
    if project.git("diff", "--quiet", "HEAD") is None:
        project.git("stash", "push", "-q", "-m", "left by a killed experiment")
        kept, place = "; git's stash has the experiment's version", "stash@{1}"
    if project.git("stash", "pop", "--index", "-q", place) is not None:
        yield f"your uncommitted changes were in git's stash: back in the workspace{kept}"
    else:
        yield f"your uncommitted changes are in git's stash ({place}): run git stash pop {place}"


def heal_queue(project: Project) -> Iterator[str]:
    """Queue a task again if its worker was killed: for DVC it would be "Running" for ever.

    Move the message back to the folder it came from, and the experiment back to DVC's stash.
    """
    celery = project.experiments / "celery"
    for path in sorted(celery.glob("broker/processed/*.celery.msg")):
        message = json.loads(path.read_bytes() or "{}")
        headers = message.get("headers", {})
        result = celery / "result" / f"celery-task-meta-{headers.get('id')}"
        if headers.get("task") != RUN_EXPERIMENT or (result.exists() and result.stat().st_size):
            continue
        if project.has_living_dvc():
            return
        entry = json.loads(base64.b64decode(message["body"]))[0][0]
        if stash_again(project, entry):
            path.rename(celery / "broker" / "in" / path.name)
            name = entry["name"] or entry["stash_rev"][:7]
            yield f"experiment {name} lost its worker: queued again, `dvc queue start` runs it"


def stash_again(project: Project, entry: dict[str, Any]) -> bool:
    """Put an experiment back on the stack of the workers; return False if it is gone."""
    stash, revision = entry["stash_ref"], entry["stash_rev"]
    if revision in (project.git("log", "-g", "--format=%H", stash) or "").split():
        return True
    message = f"commit: dvc-exp:{entry['head_rev']}:{entry['baseline_rev']}:{entry['name'] or ''}"
    message += f":{entry['branch']}" if entry["branch"] else ""
    done = project.git("update-ref", "--create-reflog", "-m", message, stash, revision)
    return done is not None


def drop_dead_folders(project: Project) -> Iterator[str]:
    """Remove the temporary workspaces of killed experiments: they hold no results."""
    folders = [*project.experiments.glob("tmp*"), *project.experiments.glob("standalone/tmp*")]
    if folders and not project.has_living_dvc():
        for folder in sorted(folders):
            shutil.rmtree(folder)
            yield f"{folder.relative_to(project.root)} was left by an experiment: removed"


def taken_back(project: Project) -> list[str]:
    """Return the files that `dvc exp apply` reset to the commit that the experiment started from.

    They have newer commits, but the workspace has the experiment's version. Leave out results and
    settings: a user applies an experiment to get those.
    """
    if project.git("rev-parse", "-q", "--verify", APPLIED) is None:
        return []

    def differing(*revisions: str) -> set[str]:
        here = ("--", ".", ":!params.yaml", ":!dvc.lock", ":!metrics")
        found = project.git("diff", "--name-only", "--relative", *revisions, *here) or ""
        return set(found.splitlines())

    return sorted((differing(f"{APPLIED}^", "HEAD") & differing("HEAD")) - differing(APPLIED))
