"""Plan before running: what a training holds, computes, takes and costs.

    python -m lm.plan [--params presets/NAME.yaml] [-S section.key=value ...] [--price EUR_PER_HOUR]
    python -m lm.plan --check [--params ...] [-S ...]      is every setting right?
    python -m lm.plan -S train.parallel=fsdp -S runtime.num_processes=64 [--bandwidth GB_PER_S]

    settings -> parameters, FLOPs per token, memory by moment -> micro-batch size, compile or not
    a few steps, of this training or of a calibration -> time

All but the time is arithmetic on the settings (footprint.py). Of several processes the memory and
the time are those of each: they compute side by side.
"""

import argparse
import dataclasses
import importlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lm.base.config import RuntimeConfig, add_overrides, load_params, read_section
from lm.base.console import count, duration, say
from lm.base.errors import EnvironmentFault, InputError, is_out_of_memory, one_line_errors
from lm.base.settings import divisors, share_of_batch
from lm.data.batches import Split
from lm.data.shards import read_manifest
from lm.data.tokenizer import byte_tokenizer
from lm.machine.device import (
    choose_device,
    describe,
    multiplies_natively,
    no_compiling,
    no_loading,
    prepare,
)
from lm.machine.gauges import (
    SURELY,
    free_memory_bytes,
    peak_memory_bytes,
    require_memory,
    resident_memory_bytes,
)
from lm.machine.processes import ALONE, Processes
from lm.model.transformer import ModelConfig, TransformerLM
from lm.plan.footprint import (
    batch_bytes,
    communication,
    flops_per_token,
    parameters,
    peak_memory,
)
from lm.train.loop import train
from lm.train.state import Record, TrainState, new_state
from lm.train.step import TrainConfig

LOWER = "model.d_model, model.d_ff, model.context_length or tokenizer.vocab_size"
MARGIN = 0.9  # of the free memory may be planned with
RATES = {"cpu": 50e9, "cuda": 1e14}  # nominal FLOP/s: of one thread, of a device
NATIVE_RATE = 120e9  # of one thread of a CPU that multiplies in bfloat16
REPAYS = 2.0  # times its cost is what compiling must save: a nominal rate is no measurement
FORECAST_STEPS = 3  # of which the first, which warms up, does not count
CALIBRATION_S = 10.0  # of a step, by the nominal rates: more of the batch is not measured
LONGEST_WINDOW_S = 300.0  # likewise: of a window that takes longer nothing is measured


@dataclass(frozen=True)
class Plan:
    """What a training of these settings will hold and compute on a device, or on several."""

    model: ModelConfig
    config: TrainConfig
    device: torch.device
    windows: int  # at once
    base_bytes: int  # of a process on a CPU before there is a model: interpreter and torch
    num_processes: int = 1  # each with a device of its own, or on a CPU with a share of it

    @property
    def memory(self) -> dict[str, float]:
        """Bytes by part at the fullest moment, of one process."""
        return peak_memory(
            self.model,
            self.config,
            self.device,
            self.windows,
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
        micro_batches = self.share // self.windows
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
    """The most windows at once that divide a process's share of the batch and fit; 1 if none do.

    `free_bytes` is the memory that is free for one process.
    """
    share = share_of_batch(config, num_processes)
    if config.micro_batch_size is not None:
        return config.micro_batch_size
    if free_bytes is None:
        return share
    for windows in reversed(divisors(share)):
        needed = sum(peak_memory(model, config, device, windows, 0, num_processes).values())
        if needed <= MARGIN * free_bytes:
            return windows
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
    free = _free_for_one(device, num_processes)
    windows = largest_micro_batch(model, config, device, free, num_processes)
    return Plan(model, config, device, windows, base, num_processes)


def _free_for_one(device: torch.device, num_processes: int) -> int | None:
    """The free memory of a device; on a CPU its share of one of the processes of this machine."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))  # torchrun sets it
    return free_memory_bytes(device, here)


def require_room(plan: Plan) -> None:
    """Raise EnvironmentFault with what fits if the training surely needs more memory than is free.

    Before the model is made: making one of a million layers takes long before it fails.
    """
    free, needed = _free_for_one(plan.device, plan.num_processes), _needed(plan)
    if free is not None and needed > SURELY * free:  # what fits takes a moment
        fits = _smaller(plan, free)
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
def naming_what_it_takes(plan: Plan) -> Iterator[None]:
    """Name what was planned and what to try where memory runs out within this context."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:  # an OSError of a mapping
        if not is_out_of_memory(error):
            raise
        needed = _needed(plan)
        smaller = _smaller(plan, 0.75 * needed)
        raise EnvironmentFault(
            f"out of memory: {_takes(plan)} about {needed / 1e6:,.0f} MB; "
            + (f"try {smaller}" if smaller else f"lower {LOWER}")
        ) from None


def _takes(plan: Plan) -> str:
    """What is trained, for a line on its memory."""
    at_once = f"{count(plan.windows, 'window')} at a time"
    return f"training {sum(parameters(plan.model).values()):,} parameters with {at_once} takes"


def _needed(plan: Plan) -> float:
    """Bytes of one process beside what it holds before there is a model."""
    held = sum(dataclasses.replace(plan, base_bytes=0).memory.values())
    return held + batch_bytes(plan.model, plan.config, plan.share)


def _smaller(plan: Plan, free: float) -> str | None:
    """The first change of settings with which the plan fits into so many bytes, in words."""
    share, layers, one = plan.share, plan.model.num_layers, {"micro_batch_size": 1}
    changes: list[tuple[dict[str, Any], int]] = [
        *(({"micro_batch_size": n}, layers) for n in reversed(divisors(share)) if n < plan.windows),
        (one | {"gradient_checkpointing": True}, layers),
        *((one | {"batch_size": n * plan.num_processes}, layers) for n in _halves(share)),
        *((one, n) for n in _halves(layers)),
    ]
    for change, num_layers in changes:
        model = dataclasses.replace(plan.model, num_layers=num_layers)
        with suppress(InputError):  # a tree's leaves cannot be cut anyhow
            config = dataclasses.replace(plan.config, **change)
            windows = config.windows_at_once
            other = dataclasses.replace(plan, model=model, config=config, windows=windows)
            if _needed(other) <= MARGIN * free:
                words = [f"train.{name}: {str(value).lower()}" for name, value in change.items()]
                return ", ".join(
                    [*words, *[f"model.num_layers: {num_layers}"] * (num_layers < layers)]
                )
    return None


def _halves(number: int) -> list[int]:
    """Half of a number, a quarter, ... to 1."""
    return [number >> n for n in range(1, number.bit_length())]


def tell(plan: Plan, asked: TrainConfig) -> None:
    """Say the plan in a few lines, at the head of a training."""
    per_step = plan.flops / plan.config.max_steps
    memory, processes = sum(plan.memory.values()), plan.num_processes
    say(
        f"Plan: {count(plan.config.max_steps, 'step')} of {per_step / 1e9:,.1f} GFLOP, "
        f"{plan.flops:.2e} FLOP in all; memory at most {memory / 1e6:,.0f} MB"
        + f" in each of {processes} processes ({plan.config.parallel})"
        * (processes > 1)
    )
    if asked.compile == "auto":
        done = "compiled" if plan.config.compile else "not compiled"
        say(f"Plan: {done}: {compiling(plan.model, asked, plan.device)[1]}")
    if plan.windows < (asked.micro_batch_size or plan.share):
        say(
            f"Plan: {count(plan.windows, 'window')} at a time: all {plan.share} do not fit into "
            f"{(_free_for_one(plan.device, processes) or 0) / 1e6:,.0f} MB of free memory"
        )


def begin(
    plan: Plan,
    asked: TrainConfig,
    processes: Processes = ALONE,
    initialise: Callable[[TransformerLM], None] | None = None,
) -> TrainState:
    """The state before the first step, with the plan said aloud; see lm.train.state.new_state.

    Of several processes all take as many windows at once as fit into the memory of each.
    """
    state = new_state(plan.model, plan.config, plan.device, processes, initialise)
    state.micro_batch_size = min(processes.gather(plan.windows))
    say(f"Model has {state.model.num_parameters():,} parameters")
    tell(plan, asked)
    return state


class Forecast:
    """The time that a training will take, told after its first steps, and how it came out."""

    def __init__(self, plan: Plan, step: int):
        self.plan, self.left = plan, plan.config.max_steps - step
        self.start = time.perf_counter()
        self.step_seconds: list[float] = []
        self.predicted_s: float | None = None

    def heard(self, record: Record) -> Record:
        """The record of a finished step; after the first few say how long the rest will take."""
        if len(self.step_seconds) == FORECAST_STEPS:
            return record
        self.step_seconds.append(record["step_s"])
        if len(self.step_seconds) == FORECAST_STEPS:
            step_s = statistics.median(self.step_seconds[1:])
            rest_s = seconds_for(self.plan, self.left - FORECAST_STEPS, step_s)
            self.predicted_s = time.perf_counter() - self.start + rest_s
            if rest_s >= 1:
                say(f"Plan: {duration(self.predicted_s)} by the pace of the first steps")
        return record

    def beside_measured(self, device: torch.device) -> dict[str, Any]:
        """Predicted beside measured, for metrics/performance.json."""
        elapsed_s = time.perf_counter() - self.start
        predicted_s = self.predicted_s and round(self.predicted_s, 3)
        return {
            "memory_bytes": {
                "predicted": round(sum(self.plan.memory.values())),
                "measured": peak_memory_bytes(device),
            },
            "seconds": {"predicted": predicted_s, "measured": round(elapsed_s, 3)},
        }


def seconds_for(plan: Plan, steps: int, step_s: float) -> float:
    """Seconds for so many steps and their validations, which are forward passes alone."""
    by_part = flops_per_token(plan.model, plan.config, plan.device)
    forward = sum(f for f, _ in by_part.values()) / sum(map(sum, by_part.values()))
    validations = -(-steps // plan.config.eval_interval)
    return step_s * (steps + validations * plan.config.eval_batches * forward)


def calibrate(plan: Plan) -> float | None:
    """Seconds of a step here, from two steps after a warm-up, on random tokens and a state apart.

    Where a step would take long, a part of its windows is measured and the rest reckoned with.
    Of several processes one computes its share of the windows, alone, with the whole model and
    nobody to send to. Torch's random generators are left as they were. None where the whole model
    does not fit here, or a single window would take minutes: such a plan is for other machines.
    """
    flops = plan.flops / plan.config.max_steps / plan.num_processes
    share_s = flops / nominal_rate(plan.config, plan.device)
    measured = max(1, min(plan.share, int(plan.share * CALIBRATION_S / share_s)))
    config = dataclasses.replace(
        plan.config,
        batch_size=measured,
        micro_batch_size=None,
        parallel="none",
        reduction="sum",
        max_steps=FORECAST_STEPS,
        warmup_steps=0,
        schedule="constant",
        on_nonfinite="skip",
    )
    windows, free = min(plan.windows, measured), _free_for_one(plan.device, 1)
    needed = sum(peak_memory(plan.model, config, plan.device, windows, 0).values())
    needed = max(needed, _needed(plan))
    if share_s / plan.share > LONGEST_WINDOW_S or (free is not None and needed > free):
        return None
    ids = np.random.default_rng(0).integers(plan.model.vocab_size, size=1 << 16, dtype=np.uint32)
    tokens = np.resize(ids, max(len(ids), 2 * plan.model.context_length))
    with torch.random.fork_rng():
        state = new_state(plan.model, config, plan.device)
        state.micro_batch_size = windows
        steps = train(state, Split("random", tokens, 0, end_id=0), config)
        seconds = [record["step_s"] for record in steps]
    return statistics.mean(seconds[1:]) * plan.share / measured


def table(
    plan: Plan, step_s: float | None, price: float | None, bandwidth: float | None = None
) -> str:
    """The plan as a page of tables (Markdown); without the seconds of a step it tells no time.

    The price is that of all processes for an hour, the bandwidth bytes per second that each sends.
    """
    model, config = plan.model, plan.config
    sizes, by_part = parameters(model), flops_per_token(model, config, plan.device)
    alone = plan.num_processes == 1
    lines = ["| part | parameters |", "|------|-----------:|"]
    lines += [f"| {part} | {count:,} |" for part, count in sizes.items()]
    lines += [f"| all | {sum(sizes.values()):,} |", ""]
    lines += [
        "| per token | FLOP forward | FLOP backward |",
        "|-----------|-------------:|--------------:|",
    ]
    lines += [f"| {part} | {f:,.0f} | {b:,.0f} |" for part, (f, b) in by_part.items()]
    lines += [f"| all | {sum(f for f, _ in by_part.values()):,.0f} "
              f"| {sum(b for _, b in by_part.values()):,.0f} |", ""]  # fmt: skip
    each = "" if alone else f" of each of {plan.num_processes} processes, {config.parallel}"
    lines += _megabytes(
        f"memory{each}, {config.dtype}, {count(plan.windows, 'window')} at once", plan.memory
    )
    if not alone:
        lines += _megabytes("a process sends for an update", plan.communication)
    other = dataclasses.replace(config, gradient_checkpointing=not config.gradient_checkpointing)
    instead = dataclasses.replace(plan, config=other)
    lines += [
        f"With train.gradient_checkpointing: {str(other.gradient_checkpointing).lower()} "
        f"{sum(instead.memory.values()) / 1e6:,.1f} MB",
    ]
    steps = f"{count(config.max_steps, 'step')}, {plan.flops:.3e} FLOP"
    sending_s = 0.0
    if bandwidth is not None:
        sending_s = sum(plan.communication.values()) / bandwidth
        lines += [f"Sending takes {sending_s:.3f} s an update at {bandwidth / 1e9:g} GB/s"]
    if step_s is None:
        return "\n".join([*lines, f"{steps}; not timed: a step is too large for this machine"])
    # computing and sending overlap, but for the first and the last part of a model
    seconds = seconds_for(plan, config.max_steps, max(step_s, sending_s))
    note = "" if alone else ", timed on one process alone with its share of the windows"
    lines += [f"{steps}, {step_s:.3f} s a step: {duration(seconds)}{note}"]
    if price is not None:
        lines += [f"{seconds / 3600 * price:,.2f} EUR at {price:g} EUR an hour"]
    return "\n".join(lines)


def _megabytes(title: str, parts: dict[str, float]) -> list[str]:
    lines = [f"| {title} | MB |", "|---|---:|"]
    lines += [f"| {part} | {size / 1e6:,.1f} |" for part, size in parts.items()]
    return [*lines, f"| all | {sum(parts.values()) / 1e6:,.1f} |", ""]


def _vocab_size(params: dict[str, dict[str, Any]]) -> int:
    """Of the tokenizer that is to be learnt; of another kind, the tokens tell, which must be there.

    Tokens say nothing of other settings than those that they were made with.
    """
    tokenizer = params.get("tokenizer", {})
    if tokenizer.get("kind") == "bytes":
        return byte_tokenizer().vocab_size
    if tokenizer.get("kind") == "bpe":
        return int(tokenizer["vocab_size"])
    manifest = Path("data/tokens/tokens.json")
    if not manifest.is_file():
        raise InputError(f"{manifest}: no such file; the vocabulary is known from the stage tokens")
    return int(read_manifest(manifest.parent)["vocab_size"])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m lm.plan", description=__doc__.split("\n")[0])
    default = Path("params.yaml")
    parser.add_argument("--params", type=Path, default=default, metavar="FILE", help="a preset")
    add_overrides(parser)
    parser.add_argument("--price", type=float, metavar="EUR_PER_HOUR", help="of all machines")
    sends = "that each of several processes can send"
    parser.add_argument("--bandwidth", type=float, metavar="GB_PER_S", help=sends)
    only = "check every setting, and run nothing"
    parser.add_argument("--check", action="store_true", help=only)
    options = parser.parse_args(arguments)
    with one_line_errors():
        if options.price is not None and not 0 <= options.price < float("inf"):
            raise InputError(f"--price {options.price}: must be >= 0")
        if options.bandwidth is not None and not 0 < options.bandwidth < float("inf"):
            raise InputError(f"--bandwidth {options.bandwidth}: must be > 0")
        where = str(options.params)
        params = load_params(options.params, options.overrides)
        if options.check:
            importlib.import_module("stages.check").check(params, where)  # no part of a training
            say(f"{where}: ok")
            return
        config = read_section(TrainConfig, params, "train", where)
        runtime = read_section(RuntimeConfig, params, "runtime", where)
        vocab_size = _vocab_size(params)
        model = read_section(ModelConfig, params, "model", where, vocab_size=vocab_size)
        device = choose_device(runtime.device)
        prepare(device, config.threads)
        say(f"Device: {describe(device)}")
        plan = make_plan(model, config, device, runtime.num_processes)
        tell(plan, config)
        try:
            require_room(plan)
        except EnvironmentFault as fault:
            say(f"Plan: not on this machine: {fault}")
        bandwidth = options.bandwidth and options.bandwidth * 1e9
        say(f"\n{table(plan, calibrate(plan), options.price, bandwidth)}")
