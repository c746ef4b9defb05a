"""Run a training in a process, alone or one of several, that saves on request.

    with Saver(shape, file, folder, parallel="none") as saver:
        size_bytes = saver.start()["size_bytes"]
        times = saver.ask(steps=4)

alone_s       seconds of each step without a save
wait_s        of a save, until it is on disk
held_s        for which the next step waits at a save in the background
meanwhile_s   of each step until that save is on disk
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.worker import Child, begin


class Saver(Child):
    """`start` trains a step and saves once, unmeasured, which makes the buffers."""

    def __init__(
        self,
        shape: tuple[int, ...],
        file: Path,
        folder: Path,
        threads: int | None = None,
        environment: dict[str, str] | None = None,
        **settings: Any,
    ):
        job = [shape, str(file), str(folder), settings]
        super().__init__("benchmarks.saver", job, threads, environment)


def main() -> None:
    """Train, save, then answer questions until stdin ends."""
    (sizes, file, folder, settings), tell = begin()
    import torch

    from benchmarks.contestants import Shape, training
    from lm.runs.run_folder import RunFolder

    state, records = training(Shape(*sizes), Path(file), torch.device("cpu"), **settings)
    processes = state.processes
    run_folder = RunFolder(Path(folder), keep=2, processes=processes)

    def step() -> float:
        return seconds(lambda: next(records))

    def save() -> None:
        run_folder.save(state.model, state.optimizer, state.step, {"best": {"step": None}})

    def save_and_wait() -> None:
        save()
        run_folder.wait()

    step()
    save_and_wait()
    files = [path for path in Path(folder).rglob("*") if path.suffix == ".safetensors"]
    tell(size_bytes=sum(path.stat().st_size for path in files))
    for question in map(json.loads, sys.stdin):
        alone_s = [step() for _ in range(question["steps"])]
        wait_s = seconds(save_and_wait)
        step()
        held_s, meanwhile_s = seconds(save), []
        committed = run_folder.checkpoint(state.step).with_suffix(".json")
        while not processes.lead(committed.exists):  # all take the same number of steps
            meanwhile_s.append(step())
        run_folder.wait()
        tell(alone_s=alone_s, wait_s=wait_s, held_s=held_s, meanwhile_s=meanwhile_s)


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
