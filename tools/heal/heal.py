"""Repair what a killed DVC leaves torn, so that the next command works: `python -m tools.heal`.

`make repro` calls it before `dvc repro`; run `make heal` before other dvc commands. DVC writes its
locks and dvc.lock in place, and an experiment moves git's HEAD and stashes changes. SIGKILL and
SIGTERM end DVC at once and leave this half done. Each function that heal() calls repairs one such
thing and yields a line about it. None touches what a living DVC holds or what may be the user's own
work. A DVC in another container or on another machine is visible only while it trains: then heal()
repairs nothing and raises Busy.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lm.base.errors import Busy, one_line_errors
from tools.heal.dvc_files import dead_claims, heal_dvc_lock, heal_rwlocks
from tools.heal.experiments import drop_dead_folders, heal_queue, heal_workspace, taken_back
from tools.heal.project import Project, locked
from tools.repository import is_under_git

DVC_TMP_FILE = re.compile(r"\.[\w-]{22}\.tmp")  # dvc_objects.fs.utils.tmp_fname
DYING_SECONDS = 3  # a killed process holds its locks until its memory is freed
NO_SCM = re.compile(r"^\s*no_scm\s*=\s*true\s*$", re.MULTILINE)
NO_GIT = "set, so that DVC works without git (its experiments do not)"


def heal(root: Path) -> Iterator[str]:
    """Repair all that a killed DVC left torn in a project; yield a line for each repair.

    Raises Busy if a training runs in the project whose process cannot be seen from here, and
    EnvironmentFault if git refuses to work in it.
    """
    project = Project(root.resolve())
    yield from heal_no_scm(project)
    if not project.tmp.is_dir():
        return
    refuse_unseen_training(project)
    healed = bool(dead_claims(project.tmp / "rwlock"))
    (project.tmp / "heal.lock").touch()
    with locked(project.tmp / "heal.lock", wait=True):
        for cure in (heal_dvc_lock, heal_workspace, heal_rwlocks, heal_queue, drop_dead_folders):
            for line in cure(project):
                healed = True
                yield line
        if healed and not project.has_living_dvc():
            yield from drop_temporary_files(project)


def heal_no_scm(project: Project) -> Iterator[str]:
    """Let DVC work where there is no git, as in an archive or an image, and use git where it is."""
    config = project.root / ".dvc/config.local"
    is_off = config.exists() and NO_SCM.search(config.read_text()) is not None
    if shutil.which("git"):
        has_git = is_under_git(project.root)
    else:
        has_git = any(
            (folder / ".git").exists() for folder in (project.root, *project.root.parents)
        )
    if has_git == is_off:
        change = ["--unset", "core.no_scm"] if is_off else ["core.no_scm", "true"]
        command = [sys.executable, "-m", "dvc", "config", "--quiet", "--local", *change]
        subprocess.run(command, cwd=project.root, check=True)
        yield f"core.no_scm in .dvc/config.local: {'removed, git is here' if has_git else NO_GIT}"


def refuse_unseen_training(project: Project) -> None:
    """Raise Busy if a process in another container or on another machine trains in the project."""
    for path in project.tmp.glob("lm-resume/*/lock"):
        try:
            pid = path.read_text().strip()
        except FileNotFoundError:  # it has just finished
            continue
        end = time.monotonic() + DYING_SECONDS
        while pid and not is_seen(project, pid):
            with locked(path) as free:
                if free:
                    break
            if time.monotonic() > end:
                message = "a process in another container or on another machine trains; wait for it"
                raise Busy(f"{path}: {message}")
            time.sleep(0.1)


def is_seen(project: Project, pid: str) -> bool:
    """Return whether a process of this number works in the project."""
    import psutil

    try:
        return Path(psutil.Process(int(pid)).cwd()).is_relative_to(project.root)
    except (psutil.Error, ValueError):
        return False


def drop_temporary_files(project: Project) -> Iterator[str]:
    """Remove files that a killed DVC copied only in part, from its cache and the workspace."""
    shown = [path for path in project.root.iterdir() if not path.name.startswith(".")]
    for place in (project.root / ".dvc/cache", project.tmp, *filter(Path.is_dir, shown)):
        if place.is_symlink():  # others may be writing there
            continue
        for folder, _, names in os.walk(place):  # skips what vanishes meanwhile
            for path in (Path(folder, name) for name in filter(DVC_TMP_FILE.fullmatch, names)):
                path.unlink(missing_ok=True)
                yield f"{path.relative_to(project.root)} was left behind: removed"


def main() -> None:
    """Heal the project in the current folder."""
    with one_line_errors():
        for line in heal(Path.cwd()):
            sys.stdout.write(f"healed: {line}\n")
        if files := " ".join(taken_back(Project(Path.cwd()))):
            sys.stdout.write(
                "note: `dvc exp apply` reset files to an older commit; to get the newest, run: "
                f"git checkout HEAD -- {files}\n"
            )
