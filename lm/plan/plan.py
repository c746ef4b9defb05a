"""Decide, before a training, what its settings leave open and whether it fits.

    settings -> parameters, FLOPs per token, memory by moment -> micro-batch size, compile or not

All is arithmetic on the settings (footprint.py); the time is measured (timing.py). With several
processes the memory is that of each. `python -m lm.plan` (__main__.py) prints a plan.
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
from lm.base.settings import Dtype, ModelConfig, TrainConfig, TrainSection, divisors, share_of_batch
from lm.machine.device import multiplies_natively, native_dtype, no_compiling, no_loading
from lm.machine.gauges import SURELY, free_memory_bytes, require_memory, resident_memory_bytes
from lm.plan.footprint import batch_bytes, communication, flops_per_token, parameters, peak_memory

LOWER = "model.d_model, model.d_ff, model.context_length or tokenizer.vocab_size"
MARGIN = 0.9  # the share of free memory that a plan may use
# By `python -m benchmarks.throughput`, rounded; nobody has measured MPS, which has no entry: it is
# planned with the rate of a CPU's thread, so a calibration measures fewer windows than it could
RATES = {"cpu": 50e9, "cuda": 1e14}  # FLOP/s of a CPU's thread, of a GPU
NATIVE_RATE = 120e9  # of a CPU's thread that multiplies in bfloat16 natively
NATIVE_SAVING, SAVING = 0.5, 0.25  # of a step by compiling, with native products and with others
COMPILING_S, COMPILING_LAYER_S = 6.0, 6.0  # of a model and of each layer, with two threads
NARROW = 128  # d_model from which a CPU gains by bfloat16, uncompiled: at 64 nothing, at 32 a loss
# Of a micro-batch whose size the plan decides. With more tokens, products run no faster (of 768
# columns, 65,536 rows are 12 rounds of a large GPU's tiles) and sending hides no better: each
# gathered weight, 4 bytes, is already used for 65,536 tokens
MOST_TOKENS = 1 << 16
REPAYS = 2.0  # times its cost is what compiling must save: a nominal rate is no measurement


@dataclass(frozen=True)
class Plan:
    """A training with all settings decided, and what it holds and computes."""

    model: ModelConfig
    config: TrainConfig
    device: torch.device
    micro_batch_size: int
    base_bytes: int  # of a process on a CPU before there is a model: interpreter and torch
    num_processes: int = 1  # each with a device of its own, or on a CPU with a share of it

    @property
    def memory(self) -> dict[str, float]:
        """Bytes of one process by part at the fullest moment."""
        run = (self.model, self.config, self.device)
        return peak_memory(*run, self.micro_batch_size, self.base_bytes, self.num_processes)

    @property
    def share(self) -> int:
        """Windows of an update that a process computes."""
        return share_of_batch(self.config, self.num_processes)

    @property
    def communication(self) -> dict[str, float]:
        """Bytes that a process sends in a step, by part."""
        micro_batches = self.share // self.micro_batch_size
        return communication(self.model, self.config, self.num_processes, micro_batches)

    @property
    def flops(self) -> float:
        """Floating-point operations of the whole training, without validations."""
        by_part = flops_per_token(self.model, self.config, self.device)
        tokens = self.config.max_steps * self.config.tokens_per_step(self.model)
        return tokens * sum(map(sum, by_part.values()))


def largest_micro_batch(
    model: ModelConfig,
    config: TrainConfig,
    device: torch.device,
    free_bytes: int | None,
    num_processes: int = 1,
) -> int:
    """Return the largest divisor of a process's share of the batch that fits; 1 if none does.

    `free_bytes` is the memory that is free for one process. See MOST_TOKENS for the most it takes.
    """
    share = share_of_batch(config, num_processes)
    if config.micro_batch_size is not None:
        return config.micro_batch_size
    most = max(1, MOST_TOKENS // model.context_length)
    for windows in reversed([n for n in divisors(share) if n <= most]):
        if free_bytes is None:
            return windows
        needed = peak_memory(model, config, device, windows, 0, num_processes)
        if sum(needed.values()) <= MARGIN * free_bytes:
            return windows
    return 1


def choose_dtype(
    model: ModelConfig, asked: TrainSection, device: torch.device
) -> tuple[Dtype, str]:
    """Return the dtype of matrix products, and why: by settings and kind of device alone."""
    if asked.dtype != "auto":
        return asked.dtype, f"train.dtype is {asked.dtype}"
    if native_dtype(device) == "float32":
        return "float32", f"this {device.type} does not multiply bfloat16 natively"
    if device.type == "cpu" and model.d_model < NARROW:
        return "float32", f"at model.d_model < {NARROW} a CPU loses by casts to bfloat16"
    return "bfloat16", f"this {device.type} multiplies it natively"


def compiling(model: ModelConfig, asked: TrainSection, device: torch.device) -> tuple[bool, str]:
    """Return whether to compile, and why: by settings, kind of device and threads alone.

    A clock must not decide: it would give other bits at another time. Nor must the number of
    processes: a run may go on with another one.
    """
    if asked.compile != "auto":
        return asked.compile, f"train.compile is {str(asked.compile).lower()}"
    if device.type not in RATES:
        return False, f"torch.compile is not tried on {device.type}"
    if reason := no_compiling(device):
        return False, f"{reason} to compile"
    config = _decided(model, asked, device, compiles=False)
    native = multiplies_natively(device, config.dtype)
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    plan = Plan(model, config, device, config.batch_size, 0)
    saved_s = plan.flops / nominal_rate(config, device) * (NATIVE_SAVING if native else SAVING)
    # of one thread's work half can be shared among several
    cost_s = (COMPILING_S + COMPILING_LAYER_S * model.num_layers) * (2 / 3 + 2 / 3 / threads)
    repays = saved_s >= REPAYS * cost_s
    if repays and (reason := no_loading(device)):
        return False, f"{reason} to compile"
    return repays, (
        f"it would save about {duration(saved_s)}, {'at least' if repays else 'less than'} "
        f"{REPAYS:g} times its cost of about {duration(cost_s)}"
    )


def _decided(
    model: ModelConfig, asked: TrainSection, device: torch.device, compiles: bool
) -> TrainConfig:
    dtype, _ = choose_dtype(model, asked, device)
    return TrainConfig(**vars(asked) | {"dtype": dtype, "compile": compiles})


def nominal_rate(config: TrainConfig, device: torch.device) -> float:
    """Return the FLOP/s that a plan assumes before anything is measured."""
    if device.type != "cpu":
        return RATES.get(device.type, RATES["cpu"])
    native = multiplies_natively(device, config.dtype)
    return (NATIVE_RATE if native else RATES["cpu"]) * torch.get_num_threads()


def make_plan(
    model: ModelConfig, asked: TrainSection, device: torch.device, num_processes: int = 1
) -> Plan:
    """Decide dtype, `compile` and micro-batch size; return the plan. Call before making the model.

    Raises InputError if this number of processes cannot share the batch.
    """
    base = resident_memory_bytes()
    compiles, _ = compiling(model, asked, device)
    config = _decided(model, asked, device, compiles)
    free = free_memory_of_one(device, num_processes)
    micro_batch_size = largest_micro_batch(model, config, device, free, num_processes)
    return Plan(model, config, device, micro_batch_size, base, num_processes)


def free_memory_of_one(device: torch.device, num_processes: int) -> int | None:
    """Return the free memory for a process: of its GPU, or of its share of this machine's RAM."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))  # torchrun sets it
    return free_memory_bytes(device, here)


def require_room(plan: Plan) -> None:
    """Raise EnvironmentFault, naming what would fit, if the training surely exceeds free memory.

    Call before making the model: one of a million layers takes long to fail.
    """
    free, needed = free_memory_of_one(plan.device, plan.num_processes), needed_memory(plan)
    if free is not None and needed > SURELY * free:  # finding what fits takes a moment
        fits = _first_that_fits(plan, free)
        remedy = f"{fits} would fit" if fits else f"not even one layer would fit: lower {LOWER}"
        require_memory(_takes(plan), needed, free, remedy)


def require_room_for_processes(num_processes: int) -> None:
    """Raise EnvironmentFault if the processes surely do not fit. Call before starting one."""
    require_memory(
        f"runtime.num_processes = {num_processes}: even without a model they take",
        float(num_processes * resident_memory_bytes()),
        free_memory_bytes(torch.device("cpu")),
        "use fewer",
    )


@contextmanager
def explain_out_of_memory(plan: Plan) -> Iterator[None]:
    """Where memory runs out in this context, raise an error with the plan and what to try."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:  # OSError: of a memory mapping
        if not is_out_of_memory(error):
            raise
        needed = needed_memory(plan)
        smaller = _first_that_fits(plan, 0.75 * needed)
        raise EnvironmentFault(
            f"out of memory: {_takes(plan)} about {needed / 1e6:,.0f} MB; "
            + (f"try {smaller}" if smaller else f"lower {LOWER}")
        ) from None


def _takes(plan: Plan) -> str:
    """Return the subject of a sentence on the training's memory."""
    numbers = sum(parameters(plan.model).values())
    return f"training {numbers:,} parameters with micro-batch size {plan.micro_batch_size} takes"


def needed_memory(plan: Plan) -> float:
    """Return the bytes of one process beyond those it holds before there is a model."""
    held = sum(dataclasses.replace(plan, base_bytes=0).memory.values())
    return held + batch_bytes(plan.model, plan.config, plan.share)


def _first_that_fits(plan: Plan, free: float) -> str | None:
    """Return the first change of settings with which the plan fits into `free` bytes, in words."""

    def halves(number: int) -> list[int]:
        return [number >> n for n in range(1, number.bit_length())]

    smaller = [n for n in reversed(divisors(plan.share)) if n < plan.micro_batch_size]
    batches = [n * plan.num_processes for n in halves(plan.share)]
    changes: list[tuple[dict[str, Any], dict[str, Any]]] = [  # of train, of model
        *(({"micro_batch_size": n}, {}) for n in smaller),
        ({"micro_batch_size": 1, "gradient_checkpointing": True}, {}),
        *(({"micro_batch_size": 1, "batch_size": n}, {}) for n in batches),
        *(({"micro_batch_size": 1}, {"num_layers": n}) for n in halves(plan.model.num_layers)),
    ]
    for train, model in changes:
        with suppress(InputError):  # a tree does not allow every micro-batch size
            other = dataclasses.replace(
                plan,
                model=dataclasses.replace(plan.model, **model),
                config=dataclasses.replace(plan.config, **train),
                micro_batch_size=train["micro_batch_size"],
            )
            if needed_memory(other) <= MARGIN * free:
                words = [f"train.{name}: {str(value).lower()}" for name, value in train.items()]
                return ", ".join([*words, *(f"model.{name}: {n}" for name, n in model.items())])
    return None
