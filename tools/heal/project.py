"""The project that is healed: its folders, its git, its locks and the processes in it."""

import fcntl
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tools.repository import run_git


class Project:
    """A project folder and the DVC processes that live in it, or in a worktree of the same git."""

    def __init__(self, root: Path):
        self.root, self.tmp, self.experiments = root, root / ".dvc/tmp", root / ".dvc/tmp/exps"

    def has_living_dvc(self) -> bool:
        """Return whether a dvc or git process has its working directory here, in any worktree."""
        import psutil  # takes 0.04 s, and most often nothing is torn

        listed = self.git("worktree", "list", "--porcelain") or ""
        worktrees = re.findall("^worktree (.*)", listed, re.MULTILINE)
        roots = [self.root, *(Path(path).resolve() for path in worktrees)]
        for process in psutil.process_iter(["cmdline", "status"]):
            words = {Path(word).name for word in (process.info["cmdline"] or [])[:3]}
            if process.info["status"] == psutil.STATUS_ZOMBIE or not words & {"dvc", "git"}:
                continue
            try:
                if any(Path(process.cwd()).is_relative_to(root) for root in roots):
                    return True
            except psutil.NoSuchProcess:
                continue
            except psutil.AccessDenied:  # another user's: it may be here
                return True
        return False

    def git(self, *arguments: str) -> str | None:
        """Return what a git command prints, or None if it fails or there is no git."""
        try:
            done = run_git(self.root, *arguments)
        except FileNotFoundError:
            return None
        return done.stdout.rstrip("\n") if done.returncode == 0 else None

    def git_folders(self) -> set[Path]:
        """Return the folders of git's index and refs: not ./.git in a worktree or a subfolder."""
        found = self.git("rev-parse", "--git-dir", "--git-common-dir") or ""
        return {(self.root / path).resolve() for path in found.splitlines()}


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a lock file as DVC holds its own (zc.lockfile is flock); yield False if it is taken.

    Never create a lock that is missing: with core.hardlink_lock, a lock that exists is taken.
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
