"""Real commands in a real project, killed by real signals, and what is left of them."""

import copy
import fcntl
import hashlib
import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from tests.project import PIPE_BYTES, Project

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
TARGETS = ("stage", "dvc", "group")
STAGES = ("corpus", "tokenizer", "tokens", "train", "evaluate", "export")


def versioned(
    folder: Path, steps: int = 20, checkpoint_interval: int = 5, eval_interval: int = 10
) -> Project:
    """A project under git, committed, that logs every step."""
    project = Project(folder)
    project.set("train.max_steps", steps)
    project.set("train.eval_interval", eval_interval)
    project.set("runtime.log_interval", 1)
    project.set("runtime.checkpoint_interval", checkpoint_interval)
    for command in ("init -q", "config user.name test", "config user.email test@example.org"):
        git(project, *command.split())
    commit(project)
    return project


def share_out(project: Project, num_processes: int) -> None:
    """Let several processes train it, to the bytes that any number of them gives."""
    project.set("train.parallel", "fsdp")
    project.set("train.reduction", "tree")
    project.set("train.micro_batch_size", 1)
    project.set("runtime.num_processes", num_processes)


def git(project: Project, *arguments: str) -> str:
    who = ("-c", "user.name=test", "-c", "user.email=test@example.org")  # a clone has none
    done = run(project, "git", *who, *arguments)
    assert done.returncode == 0, done.stdout
    return done.stdout.strip()


def commit(project: Project) -> None:
    git(project, "add", "-A")
    git(project, "commit", "-qm", "all")


def copied(project: Project, folder: Path) -> Project:
    """The same project in another folder."""
    other = copy.deepcopy(project)
    other.folder = folder
    shutil.copytree(project.folder, folder, symlinks=True)
    return other


@contextmanager
def lent(project: Project, folder: Path) -> Iterator[Project]:
    """A copy for one test, of whose processes none is left behind."""
    project = copied(project, folder)
    yield project
    project.close()
    survivors(project, 0)


def cloned(project: Project, folder: Path) -> Project:
    """A fresh clone: what git knows, no outputs, no cache."""
    git(project, "clone", "-q", str(project.folder), str(folder))
    other = copy.deepcopy(project)
    other.folder = folder
    return other


def run(
    project: Project, *command: str, timeout: float = 3000, warm: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, stderr among stdout, as far as possible in warmed processes."""
    victim = Victim(project, *command, warm=warm)
    code = victim.wait(timeout)
    return subprocess.CompletedProcess(command, code, victim.output(), "")


def dvc(project: Project, *arguments: str, code: int = 0) -> str:
    """What a dvc command says, which must end with this code."""
    if find_spec("dvc") is None:
        pytest.skip("`make test-torch` has no dvc")
    done = run(project, "dvc", *arguments)
    assert done.returncode == code, done.stdout
    return done.stdout


def ran(output: str) -> list[str]:
    """The stages that a dvc command really ran."""
    return [stage for stage in STAGES if f"Running stage '{stage}'" in output]


def heal(project: Project) -> str:
    """What the healing says."""
    done = run(project, "python", "-m", "tools.heal")
    assert done.returncode == 0, done.stdout
    return done.stdout


class Victim:
    """A command in a process group of its own, as a shell starts it.

    Its output is a small pipe that is read when somebody waits. So what it was waited for has just
    happened when the signal is sent: a training that logs each step cannot go far ahead.
    """

    def __init__(self, project: Project, *command: str, warm: bool = False):
        self.project, self.heard = project, bytearray()
        self.process = subprocess.Popen(
            command,
            cwd=project.folder,
            env=project.environment(warm),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            bufsize=0,
            pipesize=PIPE_BYTES,
        )
        os.set_blocking(self.process.stdout.fileno(), False)

    def __del__(self) -> None:
        self.process.stdout.close()  # not before: what outlives the command may still speak

    def listen(self) -> bool:
        """Read what the pipe holds; return whether nobody can write to it any more."""
        while (data := self.process.stdout.read(PIPE_BYTES)) is not None:
            if not data:
                return True
            self.heard += data
        return False

    def output(self) -> str:
        """What it has said by now."""
        self.listen()
        return self.heard.decode(errors="replace")

    def wait_for(self, text: str) -> None:
        """Wait until the output contains a text."""
        self.wait_until(lambda: text in self.output())

    def wait_until(self, condition, timeout: float = 300) -> None:
        end = time.monotonic() + timeout
        while not condition():
            ended = self.process.poll() is not None
            self.listen()
            assert condition() or not ended, f"ended before: {self.output()}"
            assert time.monotonic() < end, f"nothing came: {self.output()}"
            time.sleep(0.005)

    def kill(self, target: str, number: signal.Signals) -> None:
        """Send a signal; what is searched for takes time, so only where it is the target."""
        if target == "group":
            os.killpg(self.process.pid, number)
        elif target == "rank" and (ranks := living_ranks(self.project)):
            ranks[max(ranks)].send_signal(number)  # the last of those that train together
        elif target != "dvc" and (stage := running_stage(self.project)):
            stage.send_signal(number)
        else:
            os.kill(self.process.pid, number)

    def wait(self, timeout: float = 300) -> int:
        """The exit code."""
        end, silent = time.monotonic() + timeout, False
        while self.process.poll() is None:
            if time.monotonic() > end:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
                raise AssertionError(f"hangs: {self.output()}")
            if silent:  # its end is near
                time.sleep(0.005)
            else:
                select.select([self.process.stdout], [], [], 0.05)
                silent = self.listen()
        return self.process.returncode


def living(project: Project) -> list[psutil.Process]:
    """The processes whose working directory is in the project."""
    found = []
    for process in psutil.process_iter():
        try:
            here = Path(process.cwd()).is_relative_to(project.folder)
            if here and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def gone(processes: list[psutil.Process], seconds: float = 30) -> bool:
    """Whether processes end in time; what has ended and nobody reaps has ended."""

    def lives(process: psutil.Process) -> bool:
        try:
            return process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    end = time.monotonic() + seconds
    while any(map(lives, processes)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(lives, processes))


def process_name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return f"process {process.pid}"


def stage_name(process: psutil.Process) -> str | None:
    """Which stage of the pipeline a process is."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return None
    found = [w.removeprefix("stages.") for w in words if w.startswith("stages.")]
    return found[0] if found and words[-2:-1] == ["-m"] else None


def living_ranks(project: Project) -> dict[int, psutil.Process]:
    """The processes that train together, by their rank."""
    found = {}
    for process in living(project):
        with suppress(psutil.Error):
            environment = process.environ()
            if "RANK" in environment and "stages.train" in process.cmdline():
                found[int(environment["RANK"])] = process
    return found


def running_stage(project: Project) -> psutil.Process | None:
    return next((p for p in living(project) if stage_name(p)), None)


def held(project: Project) -> bool:
    """Whether a training's lock is held: the kernel frees it a moment after the process is gone."""
    for lock in project.folder.glob(".dvc/tmp/lm-resume/*/lock"):
        with open(lock) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


def survivors(project: Project, seconds: float = 30) -> list[str]:
    """The command lines of the processes that still live after some seconds; they are ended."""
    end = time.monotonic() + seconds
    while ((left := living(project)) or held(project)) and time.monotonic() < end:
        time.sleep(0.05)
    names = [process_name(process) for process in left]
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return names


def outputs(project: Project) -> dict[str, str]:
    """The SHA-256 of dvc.lock and of every file that the pipeline makes."""
    files = [project.folder / "dvc.lock"]
    for name in ("data", "models", "metrics"):
        files += (project.folder / name).rglob("*")
    return {
        f.relative_to(project.folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in files
        if f.is_file() and f.name not in (".gitignore", "performance.json", "wall_clock.csv")
    }


def litter(project: Project) -> list[str]:
    """The temporary files and folders in the project, as far as they are not DVC's bookkeeping."""
    found = []
    for folder, folders, files in os.walk(project.folder):
        here = Path(folder).relative_to(project.folder)
        found += [str(here / name) for name in files if name.endswith(".tmp")]
        if here.is_relative_to(".dvc/tmp/exps"):
            found += [str(here / name) for name in folders if name.startswith("tmp")]
    return found


def last_step(output: str) -> int:
    """The last training step that an output tells of; 0 without one."""
    return max((int(n) for n in re.findall(r"^step +(\d+)/", output, re.M)), default=0)


def resumed_at(output: str) -> int:
    """The step that a training went on from; 0 if it began anew."""
    found = re.findall(r"^Resumed at step (\d+)", output, re.M)
    return int(found[-1]) if found else 0
