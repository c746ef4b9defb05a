"""Several processes that train together, forked from one that has imported torch."""

import os
import pickle
import time
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from lm.base.errors import EnvironmentFault
from lm.machine.processes import joined
from tests.servers import reserved_port

# not a fork of the process of the tests, which has threads by now
_FORKS = get_context("forkserver")
# also what the functions stand in: each rank would import it, and all of lm, with its checks
_FORKS.set_forkserver_preload(
    ["tests.conftest", "tests.test_parallel", "tests.test_processes", "tests.test_sharded",
     "torch.distributed.fsdp", "torch._dynamo"]
)  # fmt: skip


def together(
    size: int, function: Callable[..., Any], *arguments: Any, parallel: str = "ddp"
) -> list[Any]:
    """What function(processes, *arguments) returns on each of `size` ranks, in their order.

    The function must be one of a module. Raises what a rank has raised, and of several the one
    whose own fault it is.
    """
    results = outcomes(size, function, *arguments, parallel=parallel)
    raised = [result for result in results if isinstance(result, BaseException)]
    if raised:
        raise min(raised, key=lambda error: isinstance(error, SystemExit | EnvironmentFault))
    return results


def outcomes(
    size: int,
    function: Callable[..., Any],
    *arguments: Any,
    parallel: str = "ddp",
    timeout_s: int = 60,
    limit_s: float = 120,
) -> list[Any]:
    """The same, but what a rank has raised stands in its place, or None if it just ended.

    `timeout_s` is runtime.process_timeout_s. After `limit_s` seconds ranks are killed.
    """
    with reserved_port() as port:
        place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        return _outcomes(size, function, arguments, place, parallel, timeout_s, limit_s)


def _outcomes(
    size: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    place: dict[str, str],
    parallel: str,
    timeout_s: int,
    limit_s: float,
) -> list[Any]:
    ranks = []
    for rank in range(size):
        here, there = _FORKS.Pipe()
        given = (there, place | {"RANK": str(rank)}, parallel, timeout_s, function, arguments)
        process = _FORKS.Process(target=_rank, args=given)
        process.start()
        there.close()
        ranks.append((process, here))
    end, results = time.monotonic() + limit_s, []
    for process, here in ranks:
        result = None
        try:
            if here.poll(max(0, end - time.monotonic())):
                result = pickle.loads(here.recv_bytes())
        except EOFError:  # it has ended
            pass
        process.join(max(0, end - time.monotonic()))
        process.kill()
        process.join()
        results.append(result)
    return results


def _rank(
    result: Connection,
    place: dict[str, str],
    parallel: str,
    timeout_s: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(place)
    warnings.simplefilter("error")
    outcome: Any
    try:
        with joined(parallel, torch.device("cpu"), timeout_s) as processes:
            outcome = function(processes, *arguments)
    except BaseException as error:
        outcome = error
    result.send_bytes(pickle.dumps(outcome))
