"""The loop of a training, as a stream of records."""

import math
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from lm.base.console import count
from lm.base.errors import Diverged
from lm.base.settings import TrainConfig as TrainConfig
from lm.data.batches import Split
from lm.machine.device import to_device
from lm.train.parallel import Backward
from lm.train.schedule import learning_rate_fraction
from lm.train.state import Record, TrainState
from lm.train.step import _backward_of, _own_micro_batches, train_step


def train(state: TrainState, split: Split, config: TrainConfig) -> Iterator[Record]:
    """Train up to config.max_steps, giving a record of each step after it.

    The caller may evaluate, save or stop between two records; nothing here notices. A step whose
    loss or gradient norm is not finite raises Diverged, or is skipped: parameters and optimizer
    stay as they are, and its record says why under "skipped".
    """
    device = state.model.head.device
    backward = _backward_of(state, config, split.end_id)
    windows = config.batch_size, state.model.config.context_length, config.seed, config.sampling
    tokens_per_step = config.batch_size * state.model.config.context_length
    while state.step < config.max_steps:
        start = time.perf_counter()
        state.processes.at(state.step + 1)
        state.model.train()
        mine = _own_windows(state, config, backward)
        x, y = (to_device(ids, device) for ids in split.batch(state.step, *windows, mine))
        try:
            record = train_step(state, x, y, config, backward)
            state.skipped_in_a_row = 0
        except Diverged as error:
            places = split.starts(state.step, *windows)
            few = f"{', '.join(map(str, places[:8]))}{', ...' * (len(places) > 8)}"
            record = _skip(state, config, f"{error}; windows at {split.name} tokens {few}")
        yield record | {
            "tokens": state.step * tokens_per_step,
            "step_s": time.perf_counter() - start,
            "forward_s": backward.forward.take(),
        }


def _own_windows(state: TrainState, config: TrainConfig, backward: Backward) -> NDArray[np.int64]:
    """Which windows of a batch this process computes, micro-batch by micro-batch."""
    numbers, size = np.array(_own_micro_batches(state, config, backward)), state.windows_at_once
    return (numbers[:, None] * size + np.arange(size)).ravel()


def _skip(state: TrainState, config: TrainConfig, reason: str) -> Record:
    """Leave a step out, or raise Diverged if that is not wanted or does not help."""
    remedy = "lower train.lr, raise train.warmup_steps or set train.dtype: float32"
    if config.on_nonfinite == "stop":
        raise Diverged(f"{reason}; parameters untouched; {remedy}")
    if state.skipped_in_a_row == config.max_skipped_steps:
        raise Diverged(
            f"{reason}; after skipping {count(config.max_skipped_steps, 'step')} in a row "
            f"(train.max_skipped_steps); {remedy}"
        )
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.skipped_steps += 1
    state.skipped_in_a_row += 1
    return {
        "step": state.step,
        "train_loss": math.nan,
        "learning_rate": learning_rate_fraction(state.step, config) * config.lr,
        "grad_norm": math.nan,
        "skipped": reason,
    }
