"""Map a function over items by several processes; results come in the order of the items."""

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
    """Return `wanted`, or if it is None, the number of cores that this process may use."""
    if wanted is not None:
        return wanted
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def ordered_map(
    work: Callable[[Item], Result], items: Iterable[Item], num_workers: int
) -> Generator[Result, None, None]:
    """Yield work(item) for each item, in their order; a single worker is this process itself.

    Raises errors of `work`, EnvironmentFault if a worker was killed, and Interrupted at SIGTERM.
    Then all workers end, and so they do when the generator is closed. Use it in `closing` if you
    may fail between two results.
    """
    # a fork inherits all that this process has imported and opened; it is safe only on Linux
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with sigterm_raises():
        if num_workers == 1:
            yield from map(work, items)
            return
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
                    "a worker process was killed, perhaps because memory ran out; lower "
                    "runtime.num_workers"
                ) from None


def _begin() -> None:
    """Ignore signals, since the parent handles them; end when the parent ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
