"""Mend what a killed DVC leaves torn, so that the next command goes on: `python -m tools.heal`.

No stage of dvc.yaml: `make repro` calls it before `dvc repro`, `make heal` before anything else.
DVC writes its locks and dvc.lock in place, and an experiment borrows HEAD and stash from git;
SIGKILL and SIGTERM end DVC at once, so whatever it was doing stays half done. Each function below
puts one such thing right and says so in a line. What a living DVC holds is left alone, and what
cannot be told from the user's own work is kept. A DVC in another container or on another machine
is seen only while it trains: then nothing is mended and Busy is raised.
"""

import base64
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from lm.base.errors import Busy, one_line_errors
from tools.repository import is_under_git, run_git

DVC_TMP_FILE = re.compile(r"\.[\w-]{22}\.tmp")  # dvc_objects.fs.utils.tmp_fname
MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")
EXEC_REFS = [f"refs/exps/exec/EXEC_{name}" for name in ("BASELINE", "MERGE", "BRANCH")]
REFS_IN = ("for-each-ref", "--format=%(refname)")
EXPERIMENT = re.compile(r"(On .*: )?dvc-exp:[0-9a-f]{40}:[0-9a-f]{40}:")
STASHED = ("log", "-g", "-1", "refs/stash")
DYING_SECONDS = 3  # a killed process holds its locks until its memory has been given back
SET_UP_SECONDS = 60  # an experiment takes far less to stash the workspace and to detach HEAD
NO_SCM = re.compile(r"^\s*no_scm\s*=\s*true\s*$", re.MULTILINE)
NO_GIT = "set, so that DVC works without git (its experiments need one)"
APPLIED = "refs/exps/exec/EXEC_APPLY"
RUN_EXPERIMENT = "dvc.repo.experiments.queue.tasks.run_exp"


class Project:
    """A project folder and the DVC processes that live in it, or in a worktree of the same git."""

    def __init__(self, root: Path):
        self.root, self.tmp, self.experiments = root, root / ".dvc/tmp", root / ".dvc/tmp/exps"

    @property  # asked anew each time: one may have started
    def has_living_dvc(self) -> bool:
        """Whether a dvc or git process has its working directory here, in any worktree."""
        import psutil  # 0.04 s, and most of the time nothing is torn

        worktrees = (self.git("worktree", "list", "--porcelain") or "").splitlines()
        paths = [
            line.removeprefix("worktree ") for line in worktrees if line.startswith("worktree ")
        ]
        roots = [self.root, *(Path(path).resolve() for path in paths)]
        for process in psutil.process_iter(["pid", "cmdline", "status"]):
            words = [Path(word).name for word in (process.info["cmdline"] or [])[:3]]
            if process.info["status"] != psutil.STATUS_ZOMBIE and {"dvc", "git"} & set(words):
                try:
                    if any(Path(process.cwd()).is_relative_to(root) for root in roots):
                        return True
                except psutil.NoSuchProcess:
                    continue
                except psutil.AccessDenied:  # somebody else's: it may be here
                    return True
        return False

    def git(self, *arguments: str) -> str | None:
        """What a git command prints, or None if it fails or there is no git."""
        try:
            done = run_git(self.root, *arguments)
        except FileNotFoundError:
            return None
        return done.stdout.rstrip("\n") if done.returncode == 0 else None

    @property
    def git_folders(self) -> set[Path]:
        """Where git keeps index and refs: in a worktree, or above a subfolder, not in .git here."""
        found = self.git("rev-parse", "--git-dir", "--git-common-dir") or ""
        return {(self.root / path).resolve() for path in found.splitlines()}


def heal(root: Path) -> Iterator[str]:
    """Put everything right that a killed DVC left in a project; yields one line per thing.

    Raises Busy if a training runs in the project whose process cannot be seen from here, and
    EnvironmentFault if git refuses to work in it.
    """
    project = Project(root.resolve())
    yield from heal_no_scm(project)
    if not project.tmp.is_dir():
        return
    refuse_unseen_training(project)
    healed = has_dead_claim(project)
    (project.tmp / "heal.lock").touch()
    with locked(project.tmp / "heal.lock", wait=True):
        for cure in (heal_dvc_lock, heal_workspace, heal_rwlocks, heal_queue, drop_dead_folders):
            for line in cure(project):
                healed = True
                yield line
        if healed and not project.has_living_dvc:
            yield from drop_temporary_files(project)


def heal_no_scm(project: Project) -> Iterator[str]:
    """Let DVC work where there is no git, as in an archive or an image, and use git where it is."""
    config = project.root / ".dvc/config.local"
    is_off = config.exists() and NO_SCM.search(config.read_text()) is not None
    if shutil.which("git") is None:
        has_git = any(
            (folder / ".git").exists() for folder in (project.root, *project.root.parents)
        )
    else:
        has_git = is_under_git(project.root)
    if has_git == is_off:
        change = ["--unset", "core.no_scm"] if is_off else ["core.no_scm", "true"]
        command = [sys.executable, "-m", "dvc", "config", "--quiet", "--local", *change]
        subprocess.run(command, cwd=project.root, check=True)
        yield f"core.no_scm in .dvc/config.local: {'removed, git is here' if has_git else NO_GIT}"


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a lock file as DVC holds its own (zc.lockfile is flock); False if it is taken.

    A lock that is missing is not made: with core.hardlink_lock its mere existence means taken.
    """
    try:
        file = open(path, "r+")  # noqa: SIM115 - closed below
    except FileNotFoundError:
        yield True
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield "/" not in file.read()  # with core.hardlink_lock it holds a path, else a pid


def refuse_unseen_training(project: Project) -> None:
    """Raise Busy if somebody in another container or on another machine trains in this project."""
    for path in project.tmp.glob("lm-resume/*/lock"):
        try:
            pid = path.read_text().strip()
        except FileNotFoundError:  # it has just finished
            continue
        if pid and not is_seen(project, pid) and not becomes_free(path):
            raise Busy(f"{path}: a process that cannot be seen from here trains; wait for it")


def becomes_free(path: Path) -> bool:
    """Whether nobody holds a lock; one that is being killed lets go of it a little later."""
    end = time.monotonic() + DYING_SECONDS
    while True:
        with locked(path) as free:
            if free or time.monotonic() > end:
                return free
        time.sleep(0.1)


def is_seen(project: Project, pid: str) -> bool:
    """Whether a process of this number works in the project."""
    import psutil

    try:
        return Path(psutil.Process(int(pid)).cwd()).is_relative_to(project.root)
    except (psutil.Error, ValueError):
        return False


def replace(path: Path, text: str) -> None:
    """Write a file so that it is the old one or the new one at any time."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text)
    scratch.replace(path)


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
            replace(path, committed + "\n")
            yield f"dvc.lock was torn ({fault}): restored from git; {where}"
        else:
            path.unlink()
            yield f"dvc.lock was torn ({fault}): removed, DVC writes it again; {where}"


def fault_of_dvc_lock(content: bytes) -> str | None:
    """What shows that a dvc.lock was not written to its end, or None.

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
    """Whether a dependency or output in dvc.lock has all that DVC writes for it."""
    if not isinstance(entry, dict) or "path" not in entry:
        return False
    if "md5" not in entry:  # what lies elsewhere has an etag, a checksum or a list of files
        return list(entry)[-1] != "hash"
    folder = MD5.fullmatch(str(entry["md5"]))
    return folder is not None and "size" in entry and (not folder[1] or "nfiles" in entry)


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
                dead = [pid for pid in dead if exists(pid)]
            if dead:
                alive = without(entries, dead)
                replace(path, json.dumps(alive))
                yield f"{name}: removed the entries of dead processes {', '.join(map(str, dead))}"


def read_rwlock(path: Path) -> dict[str, Any] | None:
    """The list, or None unless it has the form that DVC wants (dvc.rwlock.SCHEMA)."""
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
    """Who reads or writes, {"pid": ..., "cmd": ...}, once for each path."""
    readers = [holder for several in entries.get("read", {}).values() for holder in several]
    return readers + list(entries.get("write", {}).values())


def is_held(project: Project, holder: dict[str, Any], listed_in: Path) -> bool:
    """Whether the process of an entry lives and may be the DVC that made it.

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


def exists(pid: int) -> bool:
    """Whether a process has this number."""
    import psutil

    return psutil.pid_exists(pid)


def has_dead_claim(project: Project) -> bool:
    """Whether a DVC ended without taking back what it had said that it reads and writes."""
    path = project.tmp / "rwlock"
    entries = (path.exists() and read_rwlock(path)) or {}
    return any(not is_held(project, holder, path) for holder in holders(entries))


def without(entries: dict[str, Any], dead: list[int]) -> dict[str, Any]:
    """The list without the entries of some processes."""
    read = {
        path: left
        for path, several in entries.get("read", {}).items()
        if (left := [holder for holder in several if holder["pid"] not in dead])
    }
    write = {p: h for p, h in entries.get("write", {}).items() if h["pid"] not in dead}
    return {kind: left for kind, left in (("read", read), ("write", write)) if left}


def heal_workspace(project: Project) -> Iterator[str]:
    """Give back what a killed `dvc exp run` had borrowed: branch, index and uncommitted changes."""
    if not experiment_died(project) or project.has_living_dvc:
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
    """Whether an experiment was setting up, running in the workspace or being collected."""
    path = project.experiments / "rwlock"
    if project.git("rev-parse", "-q", "--verify", EXEC_REFS[0]) is not None:
        return True
    entries = read_rwlock(path) if path.exists() else {}
    return entries is None or any(not is_held(project, holder, path) for holder in holders(entries))


def set_up_at(project: Project) -> list[int]:
    """When the dead experiment began to borrow from git, as far as its traces tell."""
    path = project.experiments / "rwlock"
    traces = [folder / EXEC_REFS[0] for folder in project.git_folders]
    entries = (path.exists() and read_rwlock(path)) or {}
    if holders(entries):
        traces.append(path)
    return [int(trace.stat().st_mtime) for trace in traces if trace.exists()]


def happened_then(began: list[int], seconds: str) -> bool:
    """Whether something of this time belongs to the experiment, and not to the user after it."""
    return seconds.isdigit() and any(-1 <= int(seconds) - t <= SET_UP_SECONDS for t in began)


def drop_git_locks(project: Project) -> Iterator[str]:
    """Remove git's lock files; no git and no DVC is there to own them."""
    for folder in project.git_folders:
        for lock in sorted([*folder.glob("*.lock"), *folder.glob("refs/**/*.lock")]):
            lock.unlink()
            yield f"{os.path.relpath(lock, project.root)} was left behind: removed"


def reattach_head(project: Project, began: list[int]) -> Iterator[str]:
    """Return from the commit that DVC checked out to the branch it came from, as its own end does.

    Not if somebody has moved HEAD or the branch since, as a rebase does, or detached it himself.
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
    """Take the user's changes out of the stash where DVC puts them while it sets up an experiment.

    A workspace that is neither the user's nor clean is stashed itself. A stash with a message of
    its own, with untracked files, or of another time is the user's; none of those is dropped.
    """
    while EXPERIMENT.match(project.git(*STASHED, "--format=%s") or ""):
        project.git("stash", "drop", "-q")
        yield "an experiment was left in git's stash: dropped"
    path = project.experiments / "rwlock"
    if "workspace" not in ((path.exists() and read_rwlock(path)) or {}).get("write", {}):
        return
    stashed = project.git(*STASHED, "--format=%ct %s") or ""
    stashed_at, _, message = stashed.partition(" ")
    if not happened_then(began, stashed_at) or not message.startswith("WIP on "):
        return
    if project.git("rev-parse", "-q", "--verify", "stash@{0}^3") is not None:
        return
    if project.git("diff", "--quiet", "stash@{0}") is not None:
        yield "git's newest stash equals the workspace: left there, it may be your own"
        return
    kept, place = "", "stash@{0}"
    if project.git("diff", "--quiet", "HEAD") is None:
        project.git("stash", "push", "-q", "-m", "left by a killed experiment")
        kept, place = "; git's stash has what the experiment made of them", "stash@{1}"
    if project.git("stash", "pop", "--index", "-q", place) is not None:
        yield f"your uncommitted changes were in git's stash: back in the workspace{kept}"
    else:
        yield f"your uncommitted changes are in git's stash ({place}): take them with git stash pop"


def heal_queue(project: Project) -> Iterator[str]:
    """Queue a task again whose worker was killed: for DVC it would be "Running" for ever.

    The message goes back to the folder it was taken from, the experiment back into DVC's stash.
    """
    celery = project.experiments / "celery"
    for path in sorted(celery.glob("broker/processed/*.celery.msg")):
        message = json.loads(path.read_bytes() or "{}")
        headers = message.get("headers", {})
        result = celery / "result" / f"celery-task-meta-{headers.get('id')}"
        if headers.get("task") != RUN_EXPERIMENT or (result.exists() and result.stat().st_size):
            continue
        if project.has_living_dvc:
            return
        entry = json.loads(base64.b64decode(message["body"]))[0][0]
        if stash_again(project, entry):
            path.rename(celery / "broker" / "in" / path.name)
            name = entry["name"] or entry["stash_rev"][:7]
            yield f"experiment {name} was left running: queued again, `dvc queue start` goes on"


def stash_again(project: Project, entry: dict[str, Any]) -> bool:
    """Put an experiment back on the stack that workers take it from; False if it is gone."""
    stash, revision = entry["stash_ref"], entry["stash_rev"]
    if revision in (project.git("log", "-g", "--format=%H", stash) or "").split():
        return True
    message = f"commit: dvc-exp:{entry['head_rev']}:{entry['baseline_rev']}:{entry['name'] or ''}"
    message += f":{entry['branch']}" if entry["branch"] else ""
    done = project.git("update-ref", "--create-reflog", "-m", message, stash, revision)
    return done is not None


def drop_dead_folders(project: Project) -> Iterator[str]:
    """Remove the temporary workspaces of killed experiments: their work is not kept there."""
    folders = [*project.experiments.glob("tmp*"), *project.experiments.glob("standalone/tmp*")]
    if folders and not project.has_living_dvc:
        for folder in sorted(folders):
            shutil.rmtree(folder)
            yield f"{folder.relative_to(project.root)} was left by an experiment: removed"


def drop_temporary_files(project: Project) -> Iterator[str]:
    """Remove the half copied files of a killed DVC from its cache and from the workspace."""
    places = [project.root / ".dvc/cache", project.tmp]
    places += [p for p in project.root.iterdir() if p.is_dir() and not p.name.startswith(".")]
    for place in places:
        if place.is_symlink():  # others may be writing there
            continue
        for folder, _, names in os.walk(place):
            for name in filter(DVC_TMP_FILE.fullmatch, names):
                path = Path(folder, name)
                path.unlink()
                yield f"{path.relative_to(project.root)} was left behind: removed"


def taken_back(project: Project) -> list[str]:
    """The files that `dvc exp apply` has taken back to the older commit it started from.

    They were committed since, and lie here as the experiment has them. Results and settings are
    what one applies an experiment for.
    """
    if project.git("rev-parse", "-q", "--verify", APPLIED) is None:
        return []
    differing = ("diff", "--name-only", "--relative")
    here = ("--", ".", ":!params.yaml", ":!dvc.lock", ":!metrics")
    since, edited, own = (
        set((project.git(*differing, *revisions, *here) or "").splitlines())
        for revisions in ((f"{APPLIED}^", "HEAD"), ("HEAD",), (APPLIED,))
    )
    return sorted((since & edited) - own)


if __name__ == "__main__":
    with one_line_errors():
        for line in heal(Path.cwd()):
            sys.stdout.write(f"healed: {line}\n")
        if files := " ".join(taken_back(Project(Path.cwd()))):
            sys.stdout.write(
                "note: `dvc exp apply` took these back to an older commit; bring them up to date "
                f"by: git checkout HEAD -- {files}\n"
            )
