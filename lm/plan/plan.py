"""Decide before running what a training leaves open, and whether it fits.

    settings -> parameters, FLOPs per token, memory by moment -> micro-batch size, compile or not

All is arithmetic on the settings (footprint.py); the time is measured (forecast.py). Of several
processes the memory is that of each: they compute side by side. `python -m lm.plan` prints a plan
(page.py).
"""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from lm.base.console import duration
from lm.base.errors import EnvironmentFault, InputError, is_out_of_memory
from lm.base.settings import ModelConfig, TrainConfig, divisors, share_of_batch
from lm.machine.device import multiplies_natively, no_compiling, no_loading
from lm.machine.gauges import SURELY, free_memory_bytes, require_memory, resident_memory_bytes
from lm.plan.footprint import (
    batch_bytes,
    communication,
    flops_per_token,
    parameters,
    peak_memory,
)

LOWER = "model.d_model, model.d_ff, model.context_length or tokenizer.vocab_size"
MARGIN = 0.9  # of the free memory may be planned with
RATES = {"cpu": 50e9, "cuda": 1e14}  # nominal FLOP/s: of one thread, of a device
NATIVE_RATE = 120e9  # of one thread of a CPU that multiplies in bfloat16
REPAYS = 2.0  # times its cost is what compiling must save: a nominal rate is no measurement


@dataclass(frozen=True)
class Plan:
    """What a training of these settings will hold and compute on a device, or on several."""

    model: ModelConfig
    config: TrainConfig
    device: torch.device
    micro_batch_size: int
    base_bytes: int  # of a process on a CPU before there is a model: interpreter and torch
    num_processes: int = 1  # each with a device of its own, or on a CPU with a share of it

    @property
    def memory(self) -> dict[str, float]:
        """Bytes by part at the fullest moment, of one process."""
        return peak_memory(
            self.model,
            self.config,
            self.device,
            self.micro_batch_size,
            self.base_bytes,
            self.num_processes,
        )

    @property
    def share(self) -> int:
        """Windows of an update that a process computes."""
        return share_of_batch(self.config, self.num_processes)

    @property
    def communication(self) -> dict[str, float]:
        """Bytes that a process sends for an update, by part."""
        micro_batches = self.share // self.micro_batch_size
        return communication(self.model, self.config, self.num_processes, micro_batches)

    @property
    def flops(self) -> float:
        """Of the whole training and all processes, validations left out."""
        by_part = flops_per_token(self.model, self.config, self.device)
        tokens = self.config.max_steps * self.config.batch_size * self.model.context_length
        return tokens * sum(map(sum, by_part.values()))


def largest_micro_batch(
    model: ModelConfig,
    config: TrainConfig,
    device: torch.device,
    free_bytes: int | None,
    num_processes: int = 1,
) -> int:
    """Return the largest divisor of a process's share of the batch that fits; 1 if none does.

    `free_bytes` is the memory that is free for one process.
    """
    share = share_of_batch(config, num_processes)
    if config.micro_batch_size is not None:
        return config.micro_batch_size
    if free_bytes is None:
        return share
    for micro_batch_size in reversed(divisors(share)):
        needed = sum(
            peak_memory(model, config, device, micro_batch_size, 0, num_processes).values()
        )
        if needed <= MARGIN * free_bytes:
            return micro_batch_size
    return 1


def compiling(model: ModelConfig, config: TrainConfig, device: torch.device) -> tuple[bool, str]:
    """Whether compiling repays, and why: a function of settings, device kind and threads alone.

    A clock must not decide: another machine state would give other bits. Nor must the number of
    processes, for one: a run may go on with another.
    """
    if config.compile != "auto":
        return config.compile, f"train.compile is {str(config.compile).lower()}"
    if device.type not in RATES:
        return False, f"torch.compile is not tried on {device.type}"
    if reason := no_compiling(device):
        return False, f"{reason} to compile"
    native = multiplies_natively(device, config.dtype)
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    plan = Plan(model, dataclasses.replace(config, compile=False), device, config.batch_size, 0)
    saved_s = plan.flops / nominal_rate(config, device) * (0.5 if native else 0.25)
    cost_s = (6 + 6 * model.num_layers) * (2 / 3 + 2 / 3 / threads)
    repays = saved_s >= REPAYS * cost_s
    if repays and (reason := no_loading(device)):
        return False, f"{reason} to compile"
    return repays, (
        f"it would save about {duration(saved_s)} and cost about {duration(cost_s)}, "
        f"{'at least' if repays else 'not'} {REPAYS:g} times as much"
    )


def nominal_rate(config: TrainConfig, device: torch.device) -> float:
    """FLOP/s that are reckoned with before anything is measured."""
    if device.type != "cpu":
        return RATES.get(device.type, RATES["cpu"])
    native = multiplies_natively(device, config.dtype)
    return (NATIVE_RATE if native else RATES["cpu"]) * torch.get_num_threads()


def make_plan(
    model: ModelConfig, config: TrainConfig, device: torch.device, num_processes: int = 1
) -> Plan:
    """The plan with `compile` and the micro-batch size decided; before the model is made.

    Raises InputError where so many processes cannot share the batch.
    """
    base = resident_memory_bytes()
    compiles, _ = compiling(model, config, device)
    config = dataclasses.replace(config, compile=compiles)
    free = free_memory_of_one(device, num_processes)
    micro_batch_size = largest_micro_batch(model, config, device, free, num_processes)
    return Plan(model, config, device, micro_batch_size, base, num_processes)


def free_memory_of_one(device: torch.device, num_processes: int) -> int | None:
    """The free memory of a device; on a CPU its share of one of the processes of this machine."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))  # torchrun sets it
    return free_memory_bytes(device, here)


def require_room(plan: Plan) -> None:
    """Raise EnvironmentFault with what fits if the training surely needs more memory than is free.

    Before the model is made: making one of a million layers takes long before it fails.
    """
    free, needed = free_memory_of_one(plan.device, plan.num_processes), needed_memory(plan)
    if free is not None and needed > SURELY * free:  # what fits takes a moment
        fits = _first_that_fits(plan, free)
        remedy = f"{fits} would fit" if fits else f"not even one layer would fit: lower {LOWER}"
        require_memory(_takes(plan), needed, free, remedy)


def require_room_for_processes(num_processes: int) -> None:
    """Raise EnvironmentFault if so many processes surely do not fit, before one is started."""
    require_memory(
        f"runtime.num_processes = {num_processes}: without a model each takes as much as this one, "
        f"together",
        float(num_processes * resident_memory_bytes()),
        free_memory_bytes(torch.device("cpu")),
        "use fewer",
    )


@contextmanager
def explain_out_of_memory(plan: Plan) -> Iterator[None]:
    """Name what was planned and what to try where memory runs out within this context."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:  # an OSError of a mapping
        if not is_out_of_memory(error):
            raise
        needed = needed_memory(plan)
        smaller = _first_that_fits(plan, 0.75 * needed)
        raise EnvironmentFault(
            f"out of memory: {_takes(plan)} about {needed / 1e6:,.0f} MB; "
            + (f"try {smaller}" if smaller else f"lower {LOWER}")
        ) from None


def _takes(plan: Plan) -> str:
    """What is trained, for a line on its memory."""
    numbers = sum(parameters(plan.model).values())
    return f"training {numbers:,} parameters with micro-batch size {plan.micro_batch_size} takes"


def needed_memory(plan: Plan) -> float:
    """Bytes of one process beside what it holds before there is a model."""
    held = sum(dataclasses.replace(plan, base_bytes=0).memory.values())
    return held + batch_bytes(plan.model, plan.config, plan.share)


def _first_that_fits(plan: Plan, free: float) -> str | None:
    """The first change of settings with which the plan fits into so many bytes, in words."""
    share, layers, one = plan.share, plan.model.num_layers, {"micro_batch_size": 1}
    changes: list[tuple[dict[str, Any], int]] = [
        *(
            ({"micro_batch_size": n}, layers)
            for n in reversed(divisors(share))
            if n < plan.micro_batch_size
        ),
        (one | {"gradient_checkpointing": True}, layers),
        *((one | {"batch_size": n * plan.num_processes}, layers) for n in _halves(share)),
        *((one, n) for n in _halves(layers)),
    ]
    for change, num_layers in changes:
        model = dataclasses.replace(plan.model, num_layers=num_layers)
        with suppress(InputError):  # a tree's leaves cannot be cut anyhow
            config = dataclasses.replace(plan.config, **change)
            micro_batch_size = config.micro_batch_size or config.batch_size
            other = dataclasses.replace(
                plan, model=model, config=config, micro_batch_size=micro_batch_size
            )
            if needed_memory(other) <= MARGIN * free:
                words = [f"train.{name}: {str(value).lower()}" for name, value in change.items()]
                return ", ".join(
                    [*words, *[f"model.num_layers: {num_layers}"] * (num_layers < layers)]
                )
    return None


def _halves(number: int) -> list[int]:
    """Half of a number, a quarter, ... to 1."""
    return [number >> n for n in range(1, number.bit_length())]
