"""Call git and DVC; turn their errors into one line that says what to do."""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm.base.errors import EnvironmentFault, InputError

# git sets these for its hooks; they may name another repository
OF_A_HOOK = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_PREFIX")
CURES = {  # by words in the message of git or DVC
    "dubious ownership": "the repository belongs to another user, so git refuses to read it; "
    "run: git config --global --add safe.directory {root}",
    "not a git repository": "{root} is not under git; run `make heal`, then DVC works without",
    "Only supported for Git": "{root} is not under git, but experiments and other revisions "
    "need it; run: git init && git add -A && git commit -m begin && make heal",
    "name and email": "git does not know who you are; run: git config --global user.name NAME && "
    "git config --global user.email ADDRESS",
}
KNOWN = "`dvc exp list` and `git log` list the known ones"


def run_git(root: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a git command in the project. Raises FileNotFoundError if git is not installed."""
    return subprocess.run(
        ["git", "-C", str(root), *arguments],
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",  # a file name may be any bytes
        check=False,
        env={k: v for k, v in os.environ.items() if k not in OF_A_HOOK} | {"LC_ALL": "C"},
    )


def git(*arguments: str) -> str:
    """Return what a git command prints. Raises EnvironmentFault, with the cure, if it fails."""
    try:
        done = run_git(Path(), *arguments)
    except FileNotFoundError:
        raise EnvironmentFault("git is not installed, but DVC's experiments need it") from None
    if done.returncode != 0:
        raise _refusal(done.stderr)
    return done.stdout


def is_under_git(root: Path) -> bool:
    """Return whether git works in the project. Raises EnvironmentFault if it refuses to."""
    try:
        done = run_git(root, "rev-parse")
    except FileNotFoundError:
        return False
    if done.returncode != 0 and "not a git repository" not in done.stderr:
        raise _refusal(done.stderr)
    return done.returncode == 0


def _refusal(said: str) -> EnvironmentFault:
    return EnvironmentFault(cure(said) or f"git: {' '.join(said.split())}")


def cure(said: str) -> str | None:
    """Return what is wrong and the command that fixes it, if CURES has this error; else None."""
    place = re.search("repository at '(.*)'", said)  # a folder above, if this is a subfolder
    root = shlex.quote(place[1] if place else str(Path.cwd()))
    return next((cure.format(root=root) for words, cure in CURES.items() if words in said), None)


@contextmanager
def opened() -> Iterator[Any]:
    """Open the project with DVC; turn errors of git and DVC in the block into ours."""
    from dvc.exceptions import DvcException  # takes a second
    from dvc.repo import Repo
    from dvc.scm import RevError
    from pygit2 import GitError
    from scmrepo.exceptions import SCMError

    try:
        with Repo() as repo:
            yield repo
    except (DvcException, SCMError, GitError) as error:
        if isinstance(error, GitError):  # libgit2 does not say what to do
            git("rev-parse")
        said = " ".join(str(error).split())
        if known := cure(said):
            raise EnvironmentFault(known) from None
        raise InputError(f"{said}; {KNOWN}" if isinstance(error, RevError) else said) from None


def commit_of(repo: Any, revision: str) -> str:
    """Return the commit of an experiment, branch, tag or hash; call it within opened()."""
    from dvc.scm import resolve_rev

    return str(resolve_rev(repo.scm, revision))
