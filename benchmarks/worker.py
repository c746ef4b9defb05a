"""Run a contestant in a process of its own, which takes n steps on request.

    with Worker("ours, float32", shape, file) as worker:
        worker.start()
        seconds = worker.run(6)

Import torch only after the clock has started: the process measures that, too.
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
    """A process could not start or go on; the message is its last line of stderr."""


class Child:
    """Runs `python -m module JOB`; a context manager, whose end kills the process and its children.

    The process compiles as if for the first time: its compile cache is empty.
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
        """Start it; return its first answer, and the seconds until then: first_s."""
        start = time.perf_counter()
        self.spawn()
        said = self.answer()
        return {"first_s": time.perf_counter() - start} | said

    def spawn(self) -> None:
        """Start it, without waiting for its first answer."""
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
        """Return all that it has printed."""
        return self._errors.read_text()

    def ask(self, **question: Any) -> dict[str, Any]:
        """Return the answer to a line of JSON. Raises Failed if there is none."""
        self.request(**question)
        return self.answer()

    def request(self, **question: Any) -> None:
        """Send a line of JSON, without waiting for the answer."""
        assert self.process is not None
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it ended; answer() raises the reason
            print(json.dumps(question), file=self.process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        """Return its next answer. Raises Failed if it ended instead."""
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

    `settings` are more settings of section train, for a contestant of ours.
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
        """Return the seconds of each of some steps; one step before them does not count."""
        return self.ask(steps=steps)["seconds"]

    def slice(self, seconds: float) -> tuple[int, float]:
        """Take steps for some seconds; return their number, and the seconds until all were done."""
        said = self.ask(seconds=seconds)
        return said["steps"], said["seconds"]

    def memory(self) -> dict[str, float]:
        """Return the peak so far in bytes, and the peak without the import of torch."""
        return self.ask(memory=True)

    def measure(self, seconds: float) -> dict[str, Any]:
        """Start, run for some seconds; return all that is known: the median step_s, the memory."""
        said, taken = self.start(), self.run(2)
        while (left := seconds - sum(taken)) > 0:
            taken += self.run(max(1, min(1000, int(left / statistics.median(taken)))))
        return said | self.memory() | {"step_s": statistics.median(taken)}


@contextmanager
def token_file(vocab_size: int, count: int = 2_000_000) -> Iterator[Path]:
    """Yield a file of random token ids, the same each time."""
    import numpy as np

    with sigterm_raises(), tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tokens.bin")
        ids = np.random.default_rng(0).integers(vocab_size, size=count)
        ids.astype(np.uint16).tofile(file)
        yield file


# --- the child's side ---------------------------------------------------------------------


def begin() -> tuple[Any, Tell]:
    """Return the job and a call that answers. Send prints to stderr; end with the parent."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return json.loads(sys.argv[1]), lambda **said: print(json.dumps(said), file=answers, flush=True)


def peak_resident_bytes() -> int:
    """Return this process's peak. On Linux, ru_maxrss would include what the parent held before."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def steps_within(seconds: float, steps: Iterator[float], device: Any) -> dict[str, float]:
    """Take steps for some seconds; time only all, because a step does not wait for the device."""
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
    """Build, take a step, then answer questions until stdin ends."""
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
