"""A warmed process that forks itself for each run of a stage, and strikes at a chosen write.

Importing torch takes seconds, a run of the smoke preset half of one; the project's own modules are
imported anew by each run. The strike is real: a signal that the process sends itself, or a limit
of the operating system, right before the operation number `at` that changes a file in the project
(an audit event of Python), never a mock.

    python -m tests.faults   reads one case a line as JSON, answers each in a line of JSON
"""

import atexit
import functools
import importlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate"}


@functools.cache
def warmed() -> "subprocess.Popen[str]":
    """The warmed process, one for each process of the tests, which it ends with."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def close() -> None:
        process.stdin.close()
        process.wait()
        process.stdout.close()

    atexit.register(close)
    return process


def run_warm(folder: Path, stage: str, *arguments: str, **more: Any) -> dict[str, Any]:
    """Run a stage of the project in a folder, as `python -m stages.STAGE` would; or `lm.NAME`.

    `more`: environment, and a strike: at and signal, or limit (bytes a file may grow to).
    Gives status (negative: ended by that signal), out, err, changes of files, peak_bytes.
    """
    case = {"folder": str(folder), "stage": stage, "arguments": arguments, **more}
    warmed().stdin.write(json.dumps(case) + "\n")
    warmed().stdin.flush()
    return json.loads(warmed().stdout.readline())


def watch_changes(log: int, at: int | None, number: int) -> None:
    """Log each change of a file below the working directory; before change `at` strike.

    What changes nothing is left out, since killed before it or after it is the same: looking into
    a folder or syncing it, making one that is there.
    """
    folder, seen = str(Path.cwd()), 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, str) or not flags & os.O_ACCMODE:
                return
        elif event not in CHANGES:
            return
        path = os.path.abspath(str(arguments[0]))  # noqa: PTH100 - Path() would recurse
        if not path.startswith(folder) or (event == "os.mkdir" and os.path.isdir(path)):  # noqa: PTH112
            return
        seen += 1
        os.write(log, f"{event} {os.path.relpath(path, folder)}\n".encode())
        if seen == at:
            os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def compile_once() -> None:
    """Let forks find the code of this project's modules compiled, whichever copy they import."""
    known = {}
    for folder in ("lm", "stages", "tools"):
        for file in (ROOT / folder).rglob("*.py"):
            known[file.read_bytes()] = compile(file.read_bytes(), file, "exec")
    compiled = SourceFileLoader.source_to_code

    def source_to_code(self: Any, data: bytes, path: str, **more: Any) -> Any:
        return known.get(data) or compiled(self, data, path, **more)

    SourceFileLoader.source_to_code = source_to_code  # type: ignore[method-assign]


def child(case: dict[str, Any], log: int) -> int:
    """Run the module as `python -m` would; its exit status."""
    signal.alarm(300)  # nothing may hang
    os.chdir(case["folder"])
    sys.path.insert(0, case["folder"])
    os.environ.update(case.get("environment", {}))
    sys.argv = [case["stage"], *case["arguments"]]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "limit" in case:
        resource.setrlimit(resource.RLIMIT_FSIZE, (case["limit"], resource.RLIM_INFINITY))
    watch_changes(log, case.get("at"), case.get("signal", 0))
    try:
        name = case["stage"] if "." in case["stage"] else f"stages.{case['stage']}"
        runpy.run_module(name, run_name="__main__", alter_sys=True)
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

    def drain(name: str, reader: int) -> None:
        with open(reader) as pipe:
            result[name] = pipe.read()

    readers = []
    for name, (reader, writer) in pipes.items():
        os.close(writer)
        readers.append(threading.Thread(target=drain, args=(name, reader)))  # a full pipe blocks
        readers[-1].start()
    for thread in readers:
        thread.join()
    _, status, usage = os.wait4(pid, 0)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    changes = result["changes"].splitlines()
    status = os.waitstatus_to_exitcode(status)
    return result | {"changes": changes, "status": status, "peak_bytes": peak}


if __name__ == "__main__":
    for name in ("corpus", "tokenizer", "tokens", "train", "evaluate", "export"):
        importlib.import_module(f"stages.{name}")
    for name in [
        name for name in sys.modules if name.partition(".")[0] in ("lm", "stages", "tools")
    ]:
        del sys.modules[name]  # each run imports its own code, as a process of its own would
    for name in ("torch._dynamo", "transformers.models.llama.modeling_llama", "dvc.repo"):
        importlib.import_module(name)  # what a stage needs now and then
    compile_once()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
