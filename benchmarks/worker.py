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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from lm.signals import end_with_parent, sigterm_raises

ROOT = Path(__file__).parent.parent


class Failed(Exception):
    """A contestant could not start or did not go on; its last line of stderr."""


class Worker:
    """The parent's side; a context manager. Leaving it, for whatever reason, ends the process."""

    def __init__(
        self,
        contestant: str,
        shape: tuple[int, ...],
        file: Path,
        device: str = "cpu",
        threads: int | None = None,
        compile_cache: Path | None = None,
    ):
        """A compile cache that is not given is made, and empty: it compiles as the first time."""
        self.job = [contestant, list(shape), str(file), device]
        self.threads, self.compile_cache = threads, compile_cache
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Worker":
        self.folder = tempfile.TemporaryDirectory()
        return self

    def start(self) -> dict[str, Any]:
        """Take the first step; says how long that took from the start of the process, and what
        the process says of itself."""
        cache = self.compile_cache or Path(self.folder.name)
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
        if self.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        self.errors = open(Path(self.folder.name, "stderr"), "w+")
        start = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", json.dumps(self.job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=ROOT,
            env=environment,
            process_group=0,  # Ctrl-C is for the parent, which ends the group
        )
        said = self._answer()
        return {"first_step_s": time.perf_counter() - start} | said

    def run(self, steps: int) -> list[float]:
        """The seconds of each of some steps; one before them is not counted."""
        return self._ask({"steps": steps})["seconds"]

    def measure(self, seconds: float) -> dict[str, Any]:
        """Start, run for so long, and say all that is known: the median step_s, the memory."""
        said, taken = self.start(), self.run(2)
        while (left := seconds - sum(taken)) > 0:
            taken += self.run(max(1, min(1000, int(left / statistics.median(taken)))))
        return said | self.memory() | {"step_s": statistics.median(taken)}

    def memory(self) -> dict[str, float]:
        """The peak so far, in bytes; and without what importing torch had taken."""
        return self._ask({"memory": True})

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended; why, the answer tells
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        status = self.process.wait()
        self.errors.seek(0)
        lines = [line for line in self.errors.read().splitlines() if line.strip()]
        raise Failed(lines[-1] if lines else f"ended with status {status}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process is not None:
            with_children = os.getpgid(self.process.pid) if self.process.poll() is None else None
            if with_children is not None:
                os.killpg(with_children, signal.SIGKILL)
            self.process.communicate()
            self.errors.close()
        self.folder.cleanup()


@contextmanager
def token_file(vocab_size: int, count: int = 2_000_000) -> Iterator[Path]:
    """A file of random token ids, the same each time."""
    import numpy as np

    with sigterm_raises(), tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tokens.bin")
        ids = np.random.default_rng(0).integers(vocab_size, size=count)
        ids.astype(np.uint16).tofile(file)
        yield file


def resident_bytes(field: str) -> int:
    """Of this process: VmRSS now, VmHWM at most.

    ru_maxrss would also count what the parent held when it started this process.
    """
    if sys.platform == "linux":
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def child() -> None:
    """The process: build, take a step, then answer questions until nobody asks any more."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a contestant prints
    name, sizes, file, device_name = json.loads(sys.argv[1])
    start = time.perf_counter()
    import torch

    importing = {"import_s": time.perf_counter() - start, "import_bytes": resident_bytes("VmHWM")}
    from benchmarks.contestants import CONTESTANTS, Missing, Shape

    device = torch.device(device_name)
    try:
        contest = CONTESTANTS[name](Shape(*sizes), Path(file), device)
    except Missing as missing:
        sys.exit(str(missing))

    def tell(**answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    loss = next(contest.steps)
    told = {"parameters": contest.parameters, "flops_per_token": contest.flops_per_token}
    tell(first_loss=loss, **importing, **told)
    for line in sys.stdin:
        question = json.loads(line)
        if "steps" in question:
            next(contest.steps)
            seconds = []
            for _ in range(question["steps"]):
                start = time.perf_counter()
                next(contest.steps)
                seconds.append(time.perf_counter() - start)
            tell(seconds=seconds)
        elif device.type == "cuda":
            tell(peak_bytes=torch.cuda.max_memory_allocated(device), above_torch_bytes=0)
        else:
            peak = resident_bytes("VmHWM")
            tell(peak_bytes=peak, above_torch_bytes=peak - importing["import_bytes"])


if __name__ == "__main__":
    child()
