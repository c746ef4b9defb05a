"""Recover from a failed step: repeat it with smaller micro-batches, or skip it."""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, assert_never

import torch

from lm.base.console import count, say
from lm.base.errors import Diverged, EnvironmentFault, is_out_of_memory
from lm.base.settings import PARALLEL, TrainConfig
from lm.train.state import Record, TrainState

Step = Callable[Concatenate[TrainState, TrainConfig, ...], Any]


def retry_with_smaller_micro_batches(compute: Step) -> Step:
    """Make a function repeat itself with a lower micro-batch size when it runs out of memory."""

    @wraps(compute)
    def retrying(state: TrainState, config: TrainConfig, *batch: Any) -> Any:
        while True:
            try:
                return compute(state, config, *batch)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            lower_micro_batch_size(state, config)  # after `except`, which held the tensors

    return retrying


def lower_micro_batch_size(state: TrainState, config: TrainConfig) -> None:
    """Set the micro-batch size to the next divisor of this process's share, at most half of it.

    Raises EnvironmentFault if the settings fix the size, if it is one window already, or if other
    processes compute with it.
    """
    device, before = state.model.head.device, state.micro_batch_size
    together = PARALLEL[config.parallel].several
    share = config.batch_size // state.processes.size
    fewer = next((n for n in range(before // 2, 0, -1) if share % n == 0), None)
    if config.micro_batch_size is not None or fewer is None or together:
        smaller = f"train.micro_batch_size: {fewer}" if fewer else "a smaller model"
        raise EnvironmentFault(
            f"out of memory on {device} with micro-batch size {before}; try {smaller} or "
            "train.gradient_checkpointing: true"
        )
    state.micro_batch_size = fewer
    state.optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        if config.compile:
            torch.compiler.reset()  # a CUDA graph keeps the memory of the larger micro-batch
        torch.cuda.empty_cache()
    say(
        f"Out of memory on {device} with micro-batch size {before}: using {fewer} from now on, "
        f"repeating step {state.step + 1}"
    )


def skip_step(state: TrainState, config: TrainConfig, reason: str) -> Record:
    """Count a step without updating anything, and return its record.

    Raises Diverged if train.on_nonfinite is stop, or train.max_skipped_steps in a row were skipped.
    """
    remedy = "lower train.lr, raise train.warmup_steps or set train.dtype: float32"
    match config.on_nonfinite:
        case "stop":
            raise Diverged(f"{reason}; parameters untouched; {remedy}")
        case "skip":
            pass
        case other:
            assert_never(other)
    if state.skipped_in_a_row == config.max_skipped_steps:
        raise Diverged(
            f"{reason}; after skipping {count(config.max_skipped_steps, 'step')} in a row "
            f"(train.max_skipped_steps); {remedy}"
        )
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.skipped_steps += 1
    state.skipped_in_a_row += 1
    return {"step": state.step, "train_loss": math.nan, "grad_norm": math.nan, "skipped": reason}
