"""The processes that train one model together: who they are and what they tell each other.

    torchrun or stages.launch -- RANK, WORLD_SIZE, MASTER_ADDR --> joined --> Processes

Each runs the same program on its share of every batch. What one of them learns and all must act on
(a signal, a fault, a file that has changed) is exchanged, so that all leave at the same step. Only
rank 0 speaks and writes. A rank that dies or hangs is named by those that waited for it.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from lm import console
from lm.errors import (
    Busy,
    Diverged,
    EnvironmentFault,
    InputError,
    Interrupted,
    is_out_of_memory,
)

FAULTS = (InputError, EnvironmentFault, Busy, OSError)
GRACE_S = 5.0  # for the others to notice, too, that a rank is lost
Result = TypeVar("Result")


class Processes:
    """A process among its equals; alone, nothing is sent and nothing waited for."""

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        store: Store | None = None,
        timeout: timedelta | None = None,
    ):
        """With a store, a group for messages is made, which is not that of the gradients."""
        self.rank, self.size, self.store, self.timeout = rank, size, store, timeout
        self.messages = None
        if store is not None:
            self.messages = dist.new_group(backend="gloo", timeout=timeout)

    def again(self) -> "Processes":
        """The same once more, so that a thread of each may speak with those of the others."""
        return Processes(self.rank, self.size, self.store, self.timeout)

    @property
    def leads(self) -> bool:
        """Whether this is the one that speaks and writes."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """What each rank has passed, in their order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.messages)
        return values

    def gather_numbers(self, numbers: list[float]) -> NDArray[Any]:
        """The same for equally many numbers of each: (size, count), float64."""
        mine = torch.tensor(numbers, dtype=torch.float64)
        if self.size == 1:
            return mine[None].numpy()
        everyones = torch.empty(self.size * len(mine), dtype=torch.float64)
        dist.all_gather_single(everyones, mine, group=self.messages)
        return everyones.view(self.size, -1).numpy()

    def together(self, action: Callable[[], Result]) -> Result:
        """Do it on every rank; if it fails on one, all raise what that one raised, named."""
        if self.size == 1:
            return action()
        result, fault = _outcome(action)
        for rank, theirs in enumerate(self.gather(fault)):
            if theirs is not None:
                raise _common(theirs, f"rank {rank}: ")
        return cast(Result, result)

    def lead(self, action: Callable[[], Result]) -> Result:
        """Do it on rank 0 alone; what it gives, or raises, all get."""
        if self.size == 1:
            return action()
        result, fault = self.gather(_outcome(action) if self.leads else None)[0]
        if fault is not None:
            raise _common(fault)
        return cast(Result, result)

    def require_same(self, parts: dict[str, dict[str, Any]]) -> None:
        """Raise InputError naming rank and part unless all have passed the same as rank 0."""
        first, *others = self.gather(parts)
        for rank, theirs in enumerate(others, start=1):
            for part in first:
                keys = first[part].keys() | theirs[part].keys()
                if odd := sorted(k for k in keys if first[part].get(k) != theirs[part].get(k)):
                    more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
                    raise _common(
                        InputError(
                            f"rank {rank}: {part}: {', '.join(odd[:3])}{more} not as on rank 0; "
                            "every process needs the same code, data, settings and environment"
                        )
                    )

    def part(self) -> None:
        """Wait until all are about to leave: who hangs up first breaks what others still read."""
        with suppress(RuntimeError):
            self.gather(None)

    def at(self, step: int) -> None:
        """Note where this rank is, for those who might wait for it in vain."""
        if self.size > 1 and self.store is not None:
            self.store.set(f"at/{self.rank}", str(step))

    def lost(self, reason: str) -> EnvironmentFault | SystemExit:
        """What to leave with after a connection broke: the fault, or if another tells it, its code.

        Every rank that notices says so in the store and hangs up, so that the next one notices. The
        store is a launcher's; without one it is rank 0's, and gone with that.
        """
        assert self.store is not None
        end, left, store_is_gone = time.monotonic() + GRACE_S, {self.rank}, False
        try:
            self.store.set(f"leaves/{self.rank}", "")
            if torch.distributed.get_backend() == "gloo":
                dist.destroy_process_group()
            while time.monotonic() < end and len(left) < self.size:
                time.sleep(0.05)
                left = {r for r in range(self.size) if self.store.check([f"leaves/{r}"])}
        except dist.DistError:
            store_is_gone = True
        if self.rank != min(left):
            return SystemExit(EnvironmentFault.exit_code)
        missing = [0] if store_is_gone else [rank for rank in range(self.size) if rank not in left]
        hangs = "imed out" in reason
        return EnvironmentFault(
            f"lost {', '.join(map(self._whereabouts, missing)) or 'a connection'}: "
            f"{'no answer within runtime.process_timeout_s' if hangs else 'it has ended'}; "
            "what was saved is intact: run again to go on"
        )

    def _whereabouts(self, rank: int) -> str:
        with suppress(dist.DistError):
            if self.store is not None and self.store.check([f"at/{rank}"]):
                return f"rank {rank} in step {self.store.get(f'at/{rank}').decode()}"
        return f"rank {rank}"


ALONE = Processes()


def _outcome(action: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return action(), None
    except FAULTS as fault:
        return None, fault


def _common(fault: Exception, prefix: str = "") -> Exception:
    """The fault, to be raised by all and told by rank 0."""
    if prefix:
        fault.args = (f"{prefix}{fault}",)
    fault.common = True  # type: ignore[attr-defined]
    return fault


@contextmanager
def joined(parallel: str, device: torch.device, timeout_s: int) -> Iterator[Processes]:
    """Among the processes that torchrun started, or as the only one of its kind.

    With train.parallel = none there is nobody to join. Raises InputError if there are several
    processes nevertheless, EnvironmentFault if they do not find each other in `timeout_s` seconds.
    Within, faults that all ranks raise are told by rank 0 alone.
    """
    rank, size = (int(os.environ.get(name, default)) for name, default in _PLACE)
    if parallel == "none":
        if size > 1:
            raise InputError(
                f"train.parallel = none: is for one process, here are {size}; set ddp or fsdp"
            )
        yield ALONE
        return
    if device.type not in ("cpu", "cuda"):
        raise EnvironmentFault(f"train.parallel = {parallel}: works on cpu and cuda, not {device}")
    if rank > 0:
        console.mute()
    processes = _join(rank, size, device, timedelta(seconds=timeout_s))
    try:
        yield processes
    except (*FAULTS, Diverged, Interrupted) as fault:
        if getattr(fault, "common", False) or isinstance(fault, Diverged | Interrupted):
            processes.part()
            if not processes.leads:
                raise SystemExit(fault.exit_code if hasattr(fault, "exit_code") else 3) from None
        elif size > 1:
            fault.args = (f"rank {rank}: {fault}",)
        raise
    except RuntimeError as error:
        if not _is_of_a_connection(error):
            raise
        raise processes.lost(str(error)) from None
    processes.part()
    dist.destroy_process_group()


_PLACE = (("RANK", "0"), ("WORLD_SIZE", "1"))


def _join(rank: int, size: int, device: torch.device, timeout: timedelta) -> Processes:
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    try:
        store: Store = dist.HashStore()  # type: ignore[attr-defined]
        if "RANK" in os.environ:
            store = next(rendezvous("env://", timeout=timeout))[0]
        store = PrefixStore(f"lm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        return Processes(rank, size, store, timeout)
    except (dist.DistError, RuntimeError) as error:
        said = str(error).splitlines()[0]
        raise EnvironmentFault(f"rank {rank}: the {size} processes do not meet: {said}") from None


def _is_of_a_connection(error: RuntimeError) -> bool:
    texts = ("gloo", "NCCL", "onnection", "imed out", "Broken pipe")
    return not is_out_of_memory(error) and (
        isinstance(error, dist.DistError) or any(text in str(error) for text in texts)
    )
