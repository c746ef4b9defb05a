"""The same work on many items by several processes, with the results in the order of the items."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from lm.errors import EnvironmentFault
from lm.signals import end_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")


def number_of_workers(wanted: int | None) -> int:
    """As many as wanted; None: one for each core that this process may use."""
    if wanted is not None:
        return wanted
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def ordered_map(
    work: Callable[[Item], Result], items: Iterable[Item], num_workers: int
) -> Iterator[Result]:
    """work(item) for each item, in their order; by this process itself if one is to work.

    Raises what `work` raises, and EnvironmentFault if a process was killed.
    """
    if num_workers == 1:
        yield from map(work, items)
        return
    # a forked process has what this one has imported and opened; elsewhere forks are not safe
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(num_workers, context, end_with_parent) as pool:
        try:
            yield from pool.map(work, items)
        except BrokenProcessPool:
            raise EnvironmentFault(
                "a worker process was killed, perhaps for want of memory; lower runtime.num_workers"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
