"""The same work on many items by several processes, with the results in the order of the items."""

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from lm.base.errors import EnvironmentFault
from lm.base.signals import end_with_parent, sigterm_raises

Item = TypeVar("Item")
Result = TypeVar("Result")


def number_of_workers(wanted: int | None) -> int:
    """Return `wanted`, or for None one for each core that this process may use."""
    if wanted is not None:
        return wanted
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def ordered_map(
    work: Callable[[Item], Result], items: Iterable[Item], num_workers: int
) -> Generator[Result, None, None]:
    """Return work(item) for each item, in their order; one worker is this process itself.

    Raises what `work` raises, EnvironmentFault if a process was killed, and Interrupted at SIGTERM;
    then, and when it is closed, no process goes on. Whoever may fail between two results closes it.
    """
    with sigterm_raises():
        if num_workers == 1:
            yield from map(work, items)
        else:
            yield from _by_processes(work, items, num_workers)


def _by_processes(
    work: Callable[[Item], Result], items: Iterable[Item], num_workers: int
) -> Generator[Result, None, None]:
    # a forked process has what this one has imported and opened; elsewhere forks are not safe
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(num_workers, context, _begin) as pool:
        try:
            futures = deque(pool.submit(work, item) for item in items)
            while futures:
                yield futures.popleft().result()
        except BaseException as error:
            for worker in multiprocessing.active_children():
                worker.kill()  # they ignore the SIGTERM that the pool sends them
            if not isinstance(error, BrokenProcessPool):
                raise
            raise EnvironmentFault(
                "a worker process was killed, perhaps for want of memory; lower runtime.num_workers"
            ) from None


def _begin() -> None:
    """Ignore signals, which are for the parent; end when the parent ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
