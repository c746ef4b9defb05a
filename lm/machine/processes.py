"""The processes that train one model together: how they connect, exchange and leave.

    torchrun or stages.launch -- RANK, WORLD_SIZE, MASTER_ADDR --> joined --> Processes

Each runs the same program on its share of every batch. They exchange whatever all must act on (a
signal, a fault, a changed file), so that all leave at the same step. Only rank 0 prints and writes.
The ranks that wait for one that dies or hangs report it by name.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from socket import AF_INET, AF_INET6, SHUT_RDWR, socket
from stat import S_ISSOCK
from typing import Any, TypeVar, cast
from uuid import uuid4

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from lm.base import console
from lm.base.errors import (
    Busy,
    Diverged,
    EnvironmentFault,
    InputError,
    Interrupted,
    is_out_of_memory,
)
from lm.base.settings import PARALLEL, RuntimeConfig
from lm.machine.collectives import all_gather_single

FAULTS = (InputError, EnvironmentFault, Busy, OSError)
GRACE_S = 20.0  # for the other ranks to notice; torch's launcher kills them after 30
Result = TypeVar("Result")


class Processes:
    """One of the processes of a run; a single one sends nothing and waits for nothing."""

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        store: Store | None = None,
        timeout: timedelta | None = None,
    ):
        """With a store, make a group for messages, apart from that of the gradients."""
        self.rank, self.size, self.store, self.timeout = rank, size, store, timeout
        self.messages = None
        if store is not None:
            with _recording_sockets():
                self.messages = dist.new_group(backend="gloo", timeout=timeout)

    def with_own_group(self) -> "Processes":
        """Return the same processes in another group, for a thread of each to use."""
        return Processes(self.rank, self.size, self.store, self.timeout)

    @property
    def leads(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Return the values that all ranks pass, in their order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.messages)
        return values

    def gather_numbers(self, numbers: list[float]) -> NDArray[Any]:
        """Return the numbers of all ranks, equally many from each: (size, count), float64."""
        mine = torch.tensor(numbers, dtype=torch.float64)
        if self.size == 1:
            return mine[None].numpy()
        everyones = torch.empty(self.size * len(mine), dtype=torch.float64)
        all_gather_single(everyones, mine, group=self.messages)
        return everyones.view(self.size, -1).numpy()

    def together(self, action: Callable[[], Result]) -> Result:
        """Run an action on every rank; if it fails on one, raise that fault, named, on all."""
        if self.size == 1:
            return action()
        result, fault = _outcome(action)
        faults = self.gather(fault)
        for rank, theirs in enumerate(faults):
            if theirs is not None:
                of_all = len({str(other) for other in faults}) == 1
                raise common(theirs if of_all else of_rank(rank, theirs))
        return cast(Result, result)

    def lead(self, action: Callable[[], Result]) -> Result:
        """Run an action on rank 0 alone; return its result, or raise its fault, on all."""
        if self.size == 1:
            return action()
        box = [_outcome(action) if self.leads else (None, None)]
        dist.broadcast_object_list(box, group=self.messages, group_src=0)
        result, fault = box[0]
        if fault is not None:
            raise common(fault)
        return cast(Result, result)

    def require_same(self, parts: dict[str, dict[str, Any]]) -> None:
        """Raise InputError naming rank and part unless all have passed the same as rank 0."""
        first, *others = self.gather(parts)
        for rank, theirs in enumerate(others, start=1):
            for part in first:
                keys = first[part].keys() | theirs[part].keys()
                if odd := sorted(k for k in keys if first[part].get(k) != theirs[part].get(k)):
                    raise common(
                        InputError(
                            f"rank {rank}: {part}: {console.few(odd)} not as on rank 0; "
                            "every process needs the same code, data, settings and environment"
                        )
                    )

    def leave_together(self) -> None:
        """Wait for all before disconnecting: closing early breaks ranks that are still reading."""
        with suppress(RuntimeError):
            self.gather(None)

    def will_report(self) -> None:
        """Record that this rank reports the error, so that ranks which lose it stay quiet."""
        if self.store is not None:
            with suppress(dist.DistError):
                self.store.set("reported", "")

    def begin_step(self, step: int) -> None:
        """Record the step of this rank, for the error of those that lose it."""
        if self.size > 1 and self.store is not None:
            self.store.set(f"at/{self.rank}", str(step))

    def lost(self, reason: str) -> EnvironmentFault | SystemExit:
        """Return the error to leave with after a lost connection: a fault on one rank alone.

        Each rank that notices records it in the store and disconnects, so that the next notices.
        The store is the launcher's; without a launcher it is rank 0's and ends with rank 0.
        """
        assert self.store is not None
        launched = "TORCHELASTIC_RUN_ID" in os.environ
        quiet = SystemExit(EnvironmentFault.exit_code)
        end, left = time.monotonic() + GRACE_S, {self.rank}
        try:
            self.store.set(f"leaves/{self.rank}", "")
            _break_connections()
            while time.monotonic() < end and len(left) < self.size - 1:
                time.sleep(0.05)
                left = self._ranks_that("leaves")
            time.sleep(1)  # the last one may be alive, too
            if self.store.check(["reported"]):
                return quiet
            left = self._ranks_that("leaves")
            missing = sorted(set(range(self.size)) - left)
            self.store.set(f"knows/{self.rank}", "")
            while self.leads and time.monotonic() < end and not left <= self._ranks_that("knows"):
                time.sleep(0.05)  # the store may be this rank's
        except dist.DistError:
            missing = [] if launched else [0]
            left |= {0} if launched else set()
        if self.rank != min(left):
            return quiet
        hangs = "imed out" in reason
        return EnvironmentFault(
            f"lost {', '.join(map(self._whereabouts, missing)) or 'a connection'}: "
            f"{'no answer within runtime.process_timeout_s' if hangs else 'it has ended'}; "
            "what was saved is intact: run again to go on"
        )

    def _ranks_that(self, word: str) -> set[int]:
        """Return the ranks that have set `word` in the store."""
        assert self.store is not None
        return {rank for rank in range(self.size) if self.store.check([f"{word}/{rank}"])}

    def _whereabouts(self, rank: int) -> str:
        assert self.store is not None
        with suppress(dist.DistError):
            if self.store.check([f"at/{rank}"]):
                return f"rank {rank} in step {self.store.get(f'at/{rank}').decode()}"
        return f"rank {rank}"


ALONE = Processes()


def _outcome(action: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return action(), None
    except FAULTS as fault:
        return None, fault


def common(fault: Exception) -> Exception:
    """Mark a fault that all ranks raise: rank 0 alone reports it."""
    fault.common = True  # type: ignore[attr-defined]
    return fault


def of_rank(rank: int, fault: Exception) -> Exception:
    """Put the rank's name before the message of a fault."""
    if isinstance(fault, OSError):
        where = f"{fault.filename}: " if fault.filename else ""
        return EnvironmentFault(f"rank {rank}: {where}{fault.strerror or fault}")
    fault.args = (f"rank {rank}: {fault}",)
    return fault


@contextmanager
def joined(parallel: str, device: torch.device, timeout_s: int) -> Iterator[Processes]:
    """Join the processes that torchrun started; a process without others is alone.

    Raises InputError for several processes with train.parallel = none or a GPU named by its number,
    EnvironmentFault if they cannot connect within `timeout_s` seconds. Rank 0 alone reports a fault
    that all ranks raise.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    several = PARALLEL[parallel].several
    if size > 1 and (not several or ":" in str(device)):
        if rank > 0:
            raise SystemExit(InputError.exit_code)  # rank 0 reports it
        alone, remedy = f"train.parallel = {parallel}", "ddp or fsdp"
        if several:
            alone, remedy = f"runtime.device = {device}", "cuda"
        raise InputError(f"{alone} is for one process, but there are {size}; set {remedy}")
    if not several:
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
        of_all = getattr(fault, "common", False) or isinstance(fault, Diverged | Interrupted)
        if of_all:
            processes.leave_together()
        else:
            processes.will_report()
            _break_connections()
        _disconnect()
        if of_all and not processes.leads:
            raise SystemExit(getattr(fault, "exit_code", EnvironmentFault.exit_code)) from None
        if of_all or size == 1:
            raise
        raise of_rank(rank, fault) from None
    except RuntimeError as error:
        if not _is_of_a_connection(error):
            raise
        raise processes.lost(str(error)) from None
    processes.leave_together()
    _disconnect()


def number_of_processes(runtime: RuntimeConfig, parallel: str, device: torch.device) -> int:
    """Return the number of processes that train on this machine; "auto": one for each GPU."""
    if runtime.num_processes != "auto":
        return runtime.num_processes
    several = PARALLEL[parallel].several and str(device) == "cuda"
    return torch.cuda.device_count() if several else 1


def _disconnect() -> None:
    """Close the connections, but for those of a GPU: closing would wait for a lost rank."""
    if dist.is_initialized() and dist.get_backend() == "gloo":
        with suppress(RuntimeError):  # another may have left before
            dist.destroy_process_group()


_of_groups: set[int] = set()  # the inodes of the sockets that torch opened for its groups


def _sockets() -> dict[int, int]:
    """Return the file descriptors of this process's sockets, by inode."""
    found = {}
    for file in Path("/dev/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            status = os.fstat(int(file.name))
            if S_ISSOCK(status.st_mode):
                # macOS has no inode for a socket
                found[status.st_ino or -int(file.name)] = int(file.name)
    return found


@contextmanager
def _recording_sockets() -> Iterator[None]:
    """Record the sockets that torch opens in this context; others are not ours to break."""
    before = set(_sockets())
    yield
    _of_groups.update(_sockets().keys() - before)


def _break_connections() -> None:
    """End the connections between the processes, so that those waiting for this one notice.

    Torch closes them only when nothing refers to their group, but a model and the traceback of an
    error do. The connections to the store stay, and those of a GPU are left to NCCL.
    """
    if dist.get_backend() != "gloo":
        return
    for inode, descriptor in _sockets().items():
        if inode not in _of_groups:
            continue
        with suppress(OSError), socket(fileno=os.dup(descriptor)) as connection:
            if connection.family in (AF_INET, AF_INET6):
                ports = connection.getsockname()[1], connection.getpeername()[1]
                if int(os.environ.get("MASTER_PORT", "0")) not in ports:
                    connection.shutdown(SHUT_RDWR)


def _join(rank: int, size: int, device: torch.device, timeout: timedelta) -> Processes:
    if device.type == "cuda":
        local_rank, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local_rank >= found:
            raise EnvironmentFault(
                f"rank {rank}: process {local_rank + 1} of a host that has "
                f"{console.count(found, 'GPU')}; start one process for each GPU"
            )
        if str(device) == "cuda":
            device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    try:
        store: Store = dist.HashStore()  # type: ignore[attr-defined]
        if "RANK" in os.environ:
            store = next(rendezvous("env://", timeout=timeout))[0]
        store = PrefixStore(_agree_on_a_name(store, rank, size, timeout), store)
        with _recording_sockets():
            dist.init_process_group(
                backend,
                store=store,
                rank=rank,
                world_size=size,
                timeout=timeout,
                device_id=None if device.type == "cpu" else device,  # else NCCL guesses
            )
        processes = Processes(rank, size, store, timeout)
        processes.gather(None)  # a rank that left while others still connect would look lost
        return processes
    except (dist.DistError, RuntimeError, ValueError) as error:
        with suppress(dist.DistError):
            if store.check(["reported"]):  # by one that is connected and has failed
                raise SystemExit(EnvironmentFault.exit_code) from None
        said = str(error).splitlines()[0]
        raise EnvironmentFault(
            f"rank {rank}: the {size} processes cannot connect: {said}"
        ) from None


def _agree_on_a_name(store: Store, rank: int, size: int, timeout: timedelta) -> str:
    """Return a name that only the processes of this start know.

    A launcher keeps its store over restarts, with entries of processes that have ended, and hosts
    count restarts differently. So rank 0 invites under a new name and the others answer with names
    of their own. A rank that is not on the list of answers waits for the next invitation.
    """
    me, end = uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank == 0:
        store.set("invitation", me)
        names = [store.get(f"{me}/{other}").decode() for other in range(1, size)]
        store.set(f"{me}/list", " ".join(names))
        return me
    while time.monotonic() < end:
        name = store.get("invitation").decode()
        store.set(f"{name}/{rank}", me)
        with suppress(dist.DistStoreError):  # no list yet, perhaps never
            store.wait([f"{name}/list"], timedelta(seconds=1))
            if me in store.get(f"{name}/list").decode():
                return name
        time.sleep(0.1)
    raise RuntimeError("rank 0 did not answer")


def _is_of_a_connection(error: RuntimeError) -> bool:
    texts = ("Connection", "Broken pipe", "imed out", "timeout", "NCCL")
    return not is_out_of_memory(error) and (
        isinstance(error, dist.DistError) or any(text in str(error) for text in texts)
    )
