"""A contestant in a process of its own, which takes n steps when it is told so.

    with Worker("ours, float32", shape, file) as worker:
        worker.start()
        seconds = worker.run(6)

Nothing here imports torch before the clock runs: the process measures that, too.
"""

import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from lm.base.signals import end_with_parent, sigterm_raises

ROOT = Path(__file__).parent.parent
Tell = Callable[..., None]  # keyword arguments, to the parent as a line of JSON


class Failed(Exception):
    """A process could not start or did not go on; its last line of stderr."""


class Child:
    """`python -m module JOB`; a context manager. Leaving it, for whatever reason, ends all of it.

    It compiles as the first time: its compile cache is empty.
    """

    def __init__(
        self,
        module: str,
        job: Any,
        threads: int | None = None,
        environment: dict[str, str] | None = None,
    ):
        self.command = [sys.executable, "-m", module, json.dumps(job)]
        self.environment = environment or {}
        if threads is not None:
            self.environment = self.environment | {"OMP_NUM_THREADS": str(threads)}
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Any:
        self.folder = tempfile.TemporaryDirectory()
        return self

    def start(self) -> dict[str, Any]:
        """What it says first, and how long after its start: first_s."""
        start = time.perf_counter()
        self.spawn()
        said = self.answer()
        return {"first_s": time.perf_counter() - start} | said

    def spawn(self) -> None:
        """Start it, without waiting for what it says first."""
        own_cache = {"TORCHINDUCTOR_CACHE_DIR": self.folder.name}
        with open(self._errors, "w") as errors:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env=os.environ | own_cache | self.environment,
                process_group=0,  # Ctrl-C is for the parent, which ends the group
            )

    @property
    def _errors(self) -> Path:
        return Path(self.folder.name, "stderr")

    @property
    def log(self) -> str:
        """All that it has printed."""
        return self._errors.read_text()

    def ask(self, **question: Any) -> dict[str, Any]:
        """The answer to a line of JSON. Raises Failed if there is none."""
        self.request(**question)
        return self.answer()

    def request(self, **question: Any) -> None:
        """Send a line of JSON, without waiting for the answer."""
        assert self.process is not None
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it ended; why, the answer tells
            print(json.dumps(question), file=self.process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        """The next line that it says. Raises Failed if it ended instead."""
        assert self.process is not None
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        status = self.process.wait()
        lines = [line for line in self.log.splitlines() if line.strip()]
        raise Failed(lines[-1] if lines else f"ended with status {status}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process is not None:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()
        self.folder.cleanup()


class Worker(Child):
    """A contestant by its name in benchmarks.contestants; `start` takes its first step.

    `settings` are further ones of section train, of a contestant that is ours.
    """

    def __init__(
        self,
        contestant: str,
        shape: tuple[int, ...],
        file: Path,
        device: str = "cpu",
        threads: int | None = None,
        environment: dict[str, str] | None = None,
        **settings: Any,
    ):
        job = [contestant, shape, str(file), device, settings]
        super().__init__("benchmarks.worker", job, threads, environment)

    def run(self, steps: int) -> list[float]:
        """The seconds of each of some steps; one before them is not counted."""
        return self.ask(steps=steps)["seconds"]

    def slice(self, seconds: float) -> tuple[int, float]:
        """As many steps as take so long, and the seconds until the device was done with them."""
        said = self.ask(seconds=seconds)
        return said["steps"], said["seconds"]

    def memory(self) -> dict[str, float]:
        """The peak so far, in bytes; and without what importing torch had taken."""
        return self.ask(memory=True)

    def measure(self, seconds: float) -> dict[str, Any]:
        """Start, run for so long, and say all that is known: the median step_s, the memory."""
        said, taken = self.start(), self.run(2)
        while (left := seconds - sum(taken)) > 0:
            taken += self.run(max(1, min(1000, int(left / statistics.median(taken)))))
        return said | self.memory() | {"step_s": statistics.median(taken)}


@contextmanager
def token_file(vocab_size: int, count: int = 2_000_000) -> Iterator[Path]:
    """A file of random token ids, the same each time."""
    import numpy as np

    with sigterm_raises(), tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tokens.bin")
        ids = np.random.default_rng(0).integers(vocab_size, size=count)
        ids.astype(np.uint16).tofile(file)
        yield file


# --- the child's side ---------------------------------------------------------------------


def begin() -> tuple[Any, Tell]:
    """The job, and how to answer. What a contestant prints goes to stderr; no orphan goes on."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return json.loads(sys.argv[1]), lambda **said: print(json.dumps(said), file=answers, flush=True)


def peak_resident_bytes() -> int:
    """Of this process. On Linux ru_maxrss would count what the parent held when it started this."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def steps_within(seconds: float, steps: Iterator[float], device: Any) -> dict[str, float]:
    """Take steps for so long; a step's own time means nothing where none waits for the device."""
    import torch

    synchronise = torch.get_device_module(device).synchronize
    next(steps)
    synchronise()
    start, count = time.perf_counter(), 0
    while not count or time.perf_counter() - start < seconds:
        next(steps)
        count += 1
    synchronise()
    return {"steps": count, "seconds": time.perf_counter() - start}


def main() -> None:
    """Build, take a step, then answer questions until nobody asks any more."""
    (name, sizes, file, device_name, settings), tell = begin()
    start = time.perf_counter()
    import torch

    import_s, import_bytes = time.perf_counter() - start, peak_resident_bytes()
    from benchmarks.contestants import CONTESTANTS, Missing, Shape

    device = torch.device(device_name)
    try:
        contest = CONTESTANTS[name](Shape(*sizes), Path(file), device, **settings)
    except Missing as missing:
        sys.exit(str(missing))
    loss = next(contest.steps)
    sizes = {"parameters": contest.parameters, "flops_per_token": contest.flops_per_token}
    tell(first_loss=loss, import_s=import_s, import_bytes=import_bytes, **sizes)
    for question in map(json.loads, sys.stdin):
        if "steps" in question:
            next(contest.steps)
            seconds = []
            for _ in range(question["steps"]):
                start = time.perf_counter()
                next(contest.steps)
                seconds.append(time.perf_counter() - start)
            tell(seconds=seconds)
        elif "seconds" in question:
            tell(**steps_within(question["seconds"], contest.steps, device))
        elif "profile" in question:
            from benchmarks.gpu.speed import profiled

            tell(**profiled(contest.steps, device, question["profile"]))
        elif device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
            tell(peak_bytes=peak, own_bytes=peak)
        else:
            peak = peak_resident_bytes()
            tell(peak_bytes=peak, own_bytes=peak - import_bytes)


if __name__ == "__main__":
    main()
