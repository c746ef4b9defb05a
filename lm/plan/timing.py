"""Time a training: by a calibration before it, and by its own first steps."""

import dataclasses
import statistics
import time
from typing import Any

import numpy as np
import torch

from lm.base.console import count, duration, say
from lm.base.settings import TrainSection
from lm.data.splits import Split
from lm.machine.gauges import peak_memory_bytes
from lm.plan.footprint import flops_per_token, peak_memory
from lm.plan.plan import (
    Plan,
    choose_dtype,
    compiling,
    free_memory_of_one,
    largest_micro_batch,
    needed_memory,
    nominal_rate,
)
from lm.train.loop import train
from lm.train.state import Record, new_state

TIMED_STEPS = 3  # the first one warms up and does not count
CALIBRATION_S = 10.0  # the longest step to measure, by the nominal rates
LONGEST_WINDOW_S = 300.0  # a window that takes longer, by the nominal rates, is not measured


def announce(plan: Plan, asked: TrainSection) -> None:
    """Print the plan in a few lines, at the head of a training."""
    per_step = plan.flops / plan.config.max_steps
    memory, processes = sum(plan.memory.values()), plan.num_processes
    each = f" in each of {processes} processes ({plan.config.parallel})" * (processes > 1)
    say(
        f"Plan: {count(plan.config.max_steps, 'step')} of {per_step / 1e9:,.1f} GFLOP, "
        f"{plan.flops:.2e} FLOP in all; memory at most {memory / 1e6:,.0f} MB{each}"
    )
    dtype, why = choose_dtype(plan.model, asked, plan.device)
    if plan.device.type == "cuda" and dtype == "float32":
        precision = torch.get_float32_matmul_precision()
        say(f"Plan: {dtype}: {why}; its products in precision {precision} (highest: no TF32)")
    elif asked.dtype == "auto":
        say(f"Plan: {dtype}: {why}")
    if asked.compile == "auto":
        done = "compiled" if plan.config.compile else "not compiled"
        say(f"Plan: {done}: {compiling(plan.model, asked, plan.device)[1]}")
    most = largest_micro_batch(plan.model, plan.config, plan.device, None, processes)
    if plan.micro_batch_size < most:
        say(
            f"Plan: micro-batch size {plan.micro_batch_size}: {most} windows do not fit into "
            f"{(free_memory_of_one(plan.device, processes) or 0) / 1e6:,.0f} MB of free memory"
        )


class Timing:
    """The time that a training will take, printed after its first steps, and the time it took."""

    def __init__(self, plan: Plan, step: int):
        self.plan, self.left = plan, plan.config.max_steps - step
        self.start = time.perf_counter()
        self.step_seconds: list[float] = []
        self.predicted_s: float | None = None

    def observe(self, record: Record) -> Record:
        """Return the record of a finished step; after the first few print the time to the end."""
        if self.predicted_s is None:
            self.step_seconds.append(record["step_s"])
        if self.predicted_s is None and len(self.step_seconds) == TIMED_STEPS:
            step_s = statistics.median(self.step_seconds[1:])
            rest_s = seconds_for(self.plan, self.left - TIMED_STEPS, step_s)
            self.predicted_s = time.perf_counter() - self.start + rest_s
            if rest_s >= 1:
                say(f"Plan: {duration(self.predicted_s)} by the pace of the first steps")
        return record

    def beside_measured(self, device: torch.device) -> dict[str, Any]:
        """Return predicted beside measured figures, for metrics/performance.json."""
        elapsed_s = time.perf_counter() - self.start
        predicted_s = self.predicted_s and round(self.predicted_s, 3)
        memory, peak = round(sum(self.plan.memory.values())), peak_memory_bytes(device)
        return {
            "memory_bytes": {"predicted": memory, "measured": peak},
            "seconds": {"predicted": predicted_s, "measured": round(elapsed_s, 3)},
        }


def seconds_for(plan: Plan, steps: int, step_s: float) -> float:
    """Return the seconds for `steps` and their validations, which are forward passes alone."""
    by_part = flops_per_token(plan.model, plan.config, plan.device)
    forward = sum(f for f, _ in by_part.values()) / sum(map(sum, by_part.values()))
    validations = -(-steps // plan.config.eval_interval)
    return step_s * (steps + validations * plan.config.eval_batches * forward)


def calibrate(plan: Plan) -> float | None:
    """Measure the seconds of a step: two steps after a warm-up, on random tokens from a new state.

    Where a step would take long, measure a part of the windows and scale up. For several processes
    one process computes its share of the windows with the whole model, alone. On a GPU the timed
    steps run ahead, as a training in one process does. Torch's random generators are left as they
    were. Return None if the whole model does not fit here, or a single window would take minutes:
    such a plan is for another machine.
    """
    flops = plan.flops / plan.config.max_steps / plan.num_processes
    share_s = flops / nominal_rate(plan.config, plan.device)
    measured = max(1, min(plan.share, int(plan.share * CALIBRATION_S / share_s)))
    on_gpu = plan.device.type == "cuda"
    # a CUDA graph is recorded at the second step; after a slow step the next would not run ahead
    warm_ups = 3 if on_gpu else 1
    config = dataclasses.replace(
        plan.config,
        batch_size=measured,
        micro_batch_size=None,
        parallel="none",
        reduction="sum",
        max_steps=warm_ups + 2,
        warmup_steps=0,
        schedule="constant",
        on_nonfinite="skip",
    )
    micro_batch_size = min(plan.micro_batch_size, measured)
    free = free_memory_of_one(plan.device, 1)
    needed = sum(peak_memory(plan.model, config, plan.device, micro_batch_size, 0).values())
    needed = max(needed, needed_memory(plan))
    if share_s / plan.share > LONGEST_WINDOW_S or (free is not None and needed > free):
        return None
    ids = np.random.default_rng(0).integers(plan.model.vocab_size, size=1 << 16, dtype=np.uint32)
    tokens = np.resize(ids, max(len(ids), 2 * plan.model.context_length))
    with torch.random.fork_rng([torch.cuda.current_device()] if on_gpu else []):
        state = new_state(plan.model, config, plan.device)
        state.micro_batch_size = micro_batch_size
        split = Split("random", tokens, 0, end_id=0)
        steps = train(state, split, config, pause=lambda step: step <= warm_ups)
        seconds = [record["step_s"] for record in steps]
    return statistics.mean(seconds[warm_ups:]) * plan.share / measured
