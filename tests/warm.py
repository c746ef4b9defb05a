"""Warmed processes that fork themselves for each program that a test starts.

Importing torch or DVC takes seconds, a run of the smoke preset half of one. Two servers, one for
all processes of the tests, have imported what takes long; each program is a fork of one of them,
which imports the project's modules anew, from its own folder. tests/start is the `python` and the
`dvc` that a project's programs find on their PATH and that ask for such a fork.

    python tests/warm.py FOLDER light|heavy   serves on a socket until its clients are gone

A strike is real: a signal that the process sends itself, or a limit of the operating system, right
before the operation number `at` that changes a file in the project (an audit event of Python).
"""

import atexit
import fcntl
import functools
import gc
import importlib
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import sys
import time
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

ROOT = Path(__file__).parent.parent
OURS = ("lm", "stages", "tools")
LIGHT = ("dvc", "stages.corpus", "stages.tokenizer", "stages.tokens", "tools.heal", "tools.lock")
WITHOUT = str(ROOT / "tests" / "without")
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate"}
NOTHING_HANGS_S = 300


def address(program: str) -> str:
    """Return the socket of the server for a program."""
    return f"{os.environ['LM_WARM']}/{'light' if program in LIGHT else 'heavy'}"


@functools.cache
def lifeline(path: str) -> socket.socket:
    """Return a connection that keeps a server alive; start the server if there is none."""
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        connection = socket.socket(socket.AF_UNIX)
        if not Path(path).exists():
            command = [sys.executable, __file__, *os.path.split(path)]
            os.posix_spawn(command[0], command, os.environ | {"OMP_NUM_THREADS": "1"}, setsid=True)
            while not Path(path).exists():
                time.sleep(0.05)
        connection.connect(path)
        atexit.register(connection.close)
        return connection


def run_warm(folder: Path, program: str, *arguments: str, **more: Any) -> dict[str, Any]:
    """Run a stage in a folder, as `python -m stages.NAME` would; or a module; or dvc.

    `more`: environment, and a strike: at and signal, or limit (bytes a file may grow to).
    Returns status (negative: ended by that signal), out, err, changes of files, peak_bytes.
    """
    program = program if "." in program or program == "dvc" else f"stages.{program}"
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | more.pop("environment", {})
    case = {"folder": str(folder), "program": program, "arguments": arguments, **more}
    lifeline(address(program))
    names = ("out", "err", "changes")
    pipes = {name: os.pipe() for name in names}  # no files: a limit on their size would strike here
    result: dict[str, Any] = {}

    def drain(name: str) -> None:
        with open(pipes[name][0], errors="replace") as pipe:
            result[name] = pipe.read()

    with socket.socket(socket.AF_UNIX) as connection, open(os.devnull) as nothing:
        connection.connect(address(program))
        given = [nothing.fileno(), *(writer for _, writer in pipes.values())]
        ask(connection, case | {"environment": environment}, given)
        readers = [Thread(target=drain, args=(name,)) for name in names]  # a full pipe blocks
        for (_, writer), reader in zip(pipes.values(), readers, strict=True):
            os.close(writer)
            reader.start()
        answer = json.loads(connection.recv(1 << 16))
    for reader in readers:
        reader.join()
    return result | answer | {"changes": result["changes"].splitlines()}


def ask(connection: socket.socket, case: dict[str, Any], files: list[int]) -> None:
    """Send a case with the files that the program gets: stdin, stdout, stderr, log of changes."""
    data = json.dumps(case).encode()
    socket.send_fds(connection, [len(data).to_bytes(4)], files)
    connection.sendall(data)


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
    for folder in OURS:
        for file in (ROOT / folder).rglob("*.py"):
            known[file.read_bytes()] = compile(file.read_bytes(), file, "exec")
    compiled = SourceFileLoader.source_to_code

    def source_to_code(self: Any, data: bytes, path: str, **more: Any) -> Any:
        return known.get(data) or compiled(self, data, path, **more)

    SourceFileLoader.source_to_code = source_to_code  # type: ignore[method-assign]


def child(case: dict[str, Any], files: list[int]) -> int:
    """Run the program as from a shell; return its exit status."""
    for target, file in enumerate(files[:3]):
        os.dup2(file, target)
        os.close(file)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - the server's may be of a file
    signal.alarm(NOTHING_HANGS_S)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(case["folder"])
    os.environ.clear()
    os.environ.update(case["environment"])
    sys.path[0] = case["folder"]
    if WITHOUT in os.environ.get("PYTHONPATH", ""):
        sys.path.insert(1, WITHOUT)
        forget("transformers")
    sys.argv = [case["program"], *case["arguments"]]
    if "limit" in case:
        resource.setrlimit(resource.RLIMIT_FSIZE, (case["limit"], resource.RLIM_INFINITY))
    if len(files) > 3:
        watch_changes(files[3], case.get("at"), case.get("signal", 0))
    try:
        if case["program"] == "dvc":
            from dvc.cli import main

            return int(main(case["arguments"]) or 0)
        runpy.run_module(case["program"], run_name="__main__", alter_sys=True)
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
            return 1
        return int(leaving.code or 0)
    return 0


def forget(*packages: str) -> None:
    """Let these packages be imported anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]


def received(connection: socket.socket, size: int) -> bytes:
    """Return what a client has sent; nothing if it has left, or was killed."""
    try:
        return connection.recv(size)
    except ConnectionError:
        return b""


def start(connection: socket.socket) -> int | None:
    """Fork for the case that a client sends; return the process, or None if it has left."""
    size, files, _, _ = socket.recv_fds(connection, 4, 4)
    data = bytearray()
    while len(data) < int.from_bytes(size) and (more := received(connection, 1 << 16)):
        data += more
    if not size or len(data) < int.from_bytes(size):
        return None
    pid = os.fork()
    if pid == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        status = 70
        try:
            status = child(json.loads(data), files)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    for file in files:
        os.close(file)
    return pid


def reap(running: dict[int, socket.socket]) -> None:
    """Tell the clients whose programs have ended."""
    while running:
        pid, status, usage = os.wait4(-1, os.WNOHANG)
        if not pid:
            return
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        answer = {"status": os.waitstatus_to_exitcode(status), "peak_bytes": peak}
        try:
            running.pop(pid).sendall(json.dumps(answer).encode())
        except OSError:  # the client was killed
            continue


def serve(path: str) -> None:
    """Fork for each case; pass signals on (a byte each); kill the program of a client that left."""
    ended, wakeup = socket.socketpair()
    for end in (ended, wakeup):
        end.setblocking(False)
    signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(64)
    os.rename(f"{path}.new", path)  # noqa: PTH104 - from now on clients find it
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(ended, selectors.EVENT_READ)
    running: dict[int, socket.socket] = {}
    asked: dict[socket.socket, int] = {}
    served = False
    while not served or len(selector.get_map()) > 2:
        for key, _ in selector.select():
            if key.fileobj is listener:
                selector.register(listener.accept()[0], selectors.EVENT_READ)
                served = True
            elif key.fileobj is ended:
                ended.recv(1 << 12)
                reap(running)
            elif key.fileobj not in asked and (pid := start(key.fileobj)):
                asked[key.fileobj], running[pid] = pid, key.fileobj
            else:
                number = received(key.fileobj, 1) if key.fileobj in asked else b""
                if asked.get(key.fileobj) in running:
                    os.kill(asked[key.fileobj], number[0] if number else signal.SIGKILL)
                if not number:
                    selector.unregister(key.fileobj)
                    asked.pop(key.fileobj, None)
                    key.fileobj.close()
        reap(running)


if __name__ == "__main__":
    folder, kind = sys.argv[1:]
    log = os.open(f"{folder}/{kind}.log", os.O_WRONLY | os.O_CREAT)
    for target in (1, 2):
        os.dup2(log, target)  # not the files of the test that needed it first
    sys.path[0] = str(ROOT)
    heavy = ("torch._dynamo", "transformers.models.llama.modeling_llama", "dvc.repo",
             "stages.train", "stages.evaluate", "stages.export")  # fmt: skip
    light = ("dvc.cli.parser", "dvc.repo.experiments", "dvc_data.index", "stages.corpus",
             "stages.tokenizer", "stages.tokens", "pyarrow.parquet")  # fmt: skip
    for name in heavy if kind == "heavy" else light:
        if find_spec(name.partition(".")[0]):  # `make test-torch` has no dvc
            importlib.import_module(name)
    forget(*OURS)  # each program imports its own
    compile_once()
    gc.collect()
    gc.freeze()  # a fork need not copy what its collector would only look at
    serve(f"{folder}/{kind}")
