"""A warmed process that forks itself for each run of a stage, and strikes at a chosen write.

Importing torch takes seconds, a run of the smoke preset half of one. The strike is real: a signal
that the process sends itself, or a limit of the operating system, right before the operation
number `at` that changes a file in the project (an audit event of Python), never a mock.

    python -m tests.faults   reads one case a line as JSON, answers each in a line of JSON
"""

import importlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate"}


class WarmStages:
    """The stages of a project, each run in a fork of one warmed process."""

    def __init__(self, project: Any):
        root = Path(__file__).parent.parent
        path = f"{project.folder}{os.pathsep}{root}"  # its own lm and stages, and these tests
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults"],
            cwd=project.folder,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, stage: str, *arguments: str, **strike: Any) -> dict[str, Any]:
        """Run a stage; `strike`: at and signal, or limit (bytes a file may grow to).

        Gives status (negative: ended by that signal), out, err, changes of files, peak_bytes.
        """
        case = {"stage": stage, "arguments": arguments, **strike}
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def watch_changes(log: int, at: int | None, number: int) -> None:
    """Log each change of a file below the working directory; before change `at` strike."""
    folder, seen = str(Path.cwd()), 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, str) or not (flags & os.O_ACCMODE or os.path.isdir(path)):  # noqa: PTH112
                return
        elif event not in CHANGES:
            return
        path = os.path.abspath(str(arguments[0]))  # noqa: PTH100 - Path() would recurse
        if not path.startswith(folder):
            return
        seen += 1
        os.write(log, f"{event} {os.path.relpath(path, folder)}\n".encode())
        if seen == at:
            os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def child(case: dict[str, Any], log: int) -> int:
    """Run the stage as `python -m stages.NAME` would; its exit status."""
    signal.alarm(60)  # nothing may hang
    sys.argv = [case["stage"], *case["arguments"]]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "limit" in case:
        resource.setrlimit(resource.RLIMIT_FSIZE, (case["limit"], resource.RLIM_INFINITY))
    watch_changes(log, case.get("at"), case.get("signal", 0))
    try:
        runpy.run_module(f"stages.{case['stage']}", run_name="__main__", alter_sys=True)
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def answer(case: dict[str, Any]) -> dict[str, Any]:
    """Fork, run, wait."""
    names = ("out", "err", "changes")
    pipes = {name: os.pipe() for name in names}  # no files: a limit on their size would strike here
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            os.dup2(pipes["out"][1], 1)
            os.dup2(pipes["err"][1], 2)
            status = child(case, pipes["changes"][1])
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    result: dict[str, Any] = {}
    for name, (reader, writer) in pipes.items():
        os.close(writer)
        with open(reader) as pipe:
            result[name] = pipe.read()
    _, status, usage = os.wait4(pid, 0)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    changes = result["changes"].splitlines()
    status = os.waitstatus_to_exitcode(status)
    return result | {"changes": changes, "status": status, "peak_bytes": peak}


if __name__ == "__main__":
    for name in ("corpus", "tokenizer", "tokens", "train", "evaluate"):
        importlib.import_module(f"stages.{name}")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("lm", "stages")]:
        del sys.modules[name]  # each run imports its own code, as a process of its own would
    torch.use_deterministic_algorithms(True)  # brings in half of torch's compiler

    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
