"""The training loop: batch, learning rate, step, validate, log, save."""

import time
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lm.base.errors import Diverged
from lm.base.settings import TrainConfig, WindowOrder
from lm.data.splits import Split, Splits
from lm.machine.device import to_device
from lm.model.transformer import Ids
from lm.model.validation import evaluate, loss_nats
from lm.train.accumulate import make_accumulator
from lm.train.ahead import StepsAhead
from lm.train.parallel import GradientAccumulator
from lm.train.recover import skip_step
from lm.train.schedule import learning_rate_fraction
from lm.train.state import Record, TrainState
from lm.train.step import own_numbers, train_step


@runtime_checkable
class Run(Protocol):
    """A run's life on disk, as far as the loop needs it: see lm.runs.run.Run."""

    @property
    def finished(self) -> bool: ...
    @property
    def save_due(self) -> bool: ...
    def pause_due(self, step: int) -> bool: ...
    def log(self, record: Record) -> None: ...
    def save(self) -> None: ...


def fit(state: TrainState, tokens: Splits, config: TrainConfig, run: Run) -> None:
    """Train to the end of a run; after each step validate, log and save what is due."""

    def validation_due(step: int) -> bool:
        return due(step, config.eval_interval) or step == config.max_steps

    def pause(step: int) -> bool:
        return validation_due(step) or run.pause_due(step)

    steps, paused = train(state, tokens.train, config, pause), True
    while not (paused and run.finished):
        record = next(steps)
        paused = state.step == record["step"]  # a GPU may be some steps ahead
        if paused and validation_due(state.step):
            record["valid_loss"] = validation_loss(state, tokens.valid, config)
        run.log(record)
        if paused and run.save_due:
            run.save()


def train(
    state: TrainState,
    split: Split,
    config: TrainConfig,
    pause: Callable[[int], bool] = lambda step: True,
) -> Iterator[Record]:
    """Train up to config.max_steps; yield a record after each step.

    Where `pause(step)` is true, the state is the one after that step: evaluate, save or stop there.
    Elsewhere it may be some steps ahead of the record, if state.runs_ahead. A step whose loss or
    gradient norm is not finite raises Diverged, or is skipped: parameters and optimizer stay as
    they are, and its record says why under "skipped".
    """
    accumulator = make_accumulator(state.model, config, state.processes, split.end_id)
    ahead, start = StepsAhead(state, config, accumulator), 0.0
    while state.step < config.max_steps or ahead.launched:
        if not ahead.launched:  # else the device went on since the last record
            start = time.perf_counter()
        record = None
        if state.runs_ahead:
            while ahead.room and not (ahead.launched and pause(state.step)):
                ahead.launch(*_deal(state, split, config, accumulator))
            record = ahead.take()
        if record is None:
            record = _step(state, split, config, accumulator)
        now = time.perf_counter()
        ahead.step_s, start = now - start, now
        yield record | {
            "learning_rate": learning_rate_fraction(record["step"], config) * config.lr,
            "tokens": record["step"] * config.tokens_per_step(state.model.config),
            "step_s": ahead.step_s,
            "forward_s": accumulator.forward_time.take(),
        }


def _deal(
    state: TrainState, split: Split, config: TrainConfig, accumulator: GradientAccumulator
) -> tuple[Ids, Ids]:
    """Begin the next step: set its learning rate, return this process's windows of its batch."""
    state.processes.begin_step(state.step + 1)
    state.model.train()
    fraction = learning_rate_fraction(state.step + 1, config)
    for group in state.optimizer.param_groups:
        group["lr"] = fraction * group["initial_lr"]
    own = _own_windows(state, config, accumulator)
    x, y = split.batch(state.step, *_drawing(state, config), own)
    device = state.model.head.device
    return to_device(x, device), to_device(y, device)


def _step(
    state: TrainState, split: Split, config: TrainConfig, accumulator: GradientAccumulator
) -> Record:
    """Do the next step, or skip it; see `train`."""
    x, y = _deal(state, split, config, accumulator)
    try:
        record = train_step(state, config, x, y, accumulator)
        state.skipped_in_a_row = 0
    except Diverged as error:
        starts = split.starts(state.step, *_drawing(state, config))
        few = f"{', '.join(map(str, starts[:8]))}{', ...' * (len(starts) > 8)}"
        record = skip_step(state, config, f"{error}; windows at {split.name} tokens {few}")
    return record | {"micro_batch_size": state.micro_batch_size}


def _drawing(state: TrainState, config: TrainConfig) -> tuple[int, int, int, WindowOrder]:
    """Return the settings that decide, with the step, which windows are in a batch."""
    return config.batch_size, state.model.config.context_length, config.seed, config.sampling


def _own_windows(
    state: TrainState, config: TrainConfig, accumulator: GradientAccumulator
) -> NDArray[np.int64]:
    """Return the windows of a batch that this process computes, micro-batch by micro-batch."""
    numbers, size = np.array(own_numbers(state, config, accumulator)), state.micro_batch_size
    return (numbers[:, None] * size + np.arange(size)).ravel()


def validation_loss(state: TrainState, valid: Split, config: TrainConfig) -> float:
    """Return the loss, in nats, on the batches that every validation of the run uses."""
    size = state.micro_batch_size
    dtype, most = config.dtype, config.eval_batches * config.batch_size // size
    sums = evaluate(
        state.model, valid, size, max_batches=most, dtype=dtype, processes=state.processes
    )
    return loss_nats(sums)


def due(step: int, interval: int) -> bool:
    """Return whether an action of every `interval` steps is due after this step."""
    return step % interval == 0
