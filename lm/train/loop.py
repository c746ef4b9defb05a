"""The training loop: batch, learning rate, step, validate, log, save."""

import time
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lm.base.errors import Diverged
from lm.base.settings import TrainConfig
from lm.data.batches import Split, Tokens
from lm.machine.device import to_device
from lm.model.validation import evaluate, loss_nats
from lm.train.parallel import BatchGradients
from lm.train.recover import skip_step
from lm.train.schedule import learning_rate_fraction
from lm.train.state import Record, TrainState
from lm.train.step import make_gradients, own_numbers, train_step


@runtime_checkable
class Run(Protocol):
    """A run's life on disk, as far as the loop needs it: see lm.runs.run.Run."""

    @property
    def finished(self) -> bool: ...
    @property
    def save_due(self) -> bool: ...
    def log(self, record: Record) -> None: ...
    def save(self) -> None: ...


def fit(state: TrainState, tokens: Tokens, config: TrainConfig, run: Run) -> None:
    """Train to the end of a run; after each step validate, log and save what is due."""
    steps = train(state, tokens.train, config)
    while not run.finished:
        record = next(steps)
        if due(state.step, config.eval_interval) or state.step == config.max_steps:
            record["valid_loss"] = validation_loss(state, tokens.valid, config)
        run.log(record)
        if run.save_due:
            run.save()


def train(state: TrainState, split: Split, config: TrainConfig) -> Iterator[Record]:
    """Train up to config.max_steps; yield a record after each step.

    The caller may evaluate, save or stop between two records without disturbing training. A step
    whose loss or gradient norm is not finite raises Diverged, or is skipped: parameters and
    optimizer stay as they are, and its record says why under "skipped".
    """
    device, context_length = state.model.head.device, state.model.config.context_length
    gradients = make_gradients(state.model, config, state.processes, split.end_id)
    dealt = config.batch_size, context_length, config.seed, config.sampling
    while state.step < config.max_steps:
        start = time.perf_counter()
        state.processes.begin_step(state.step + 1)
        state.model.train()
        fraction = learning_rate_fraction(state.step + 1, config)
        for group in state.optimizer.param_groups:
            group["lr"] = fraction * group["initial_lr"]
        own = _own_windows(state, config, gradients)
        x, y = (to_device(ids, device) for ids in split.batch(state.step, *dealt, own))
        try:
            record = train_step(state, config, x, y, gradients)
            state.skipped_in_a_row = 0
        except Diverged as error:
            starts = split.starts(state.step, *dealt)
            few = f"{', '.join(map(str, starts[:8]))}{', ...' * (len(starts) > 8)}"
            record = skip_step(state, config, f"{error}; windows at {split.name} tokens {few}")
        yield record | {
            "learning_rate": fraction * config.lr,
            "tokens": state.step * config.tokens_per_step(state.model.config),
            "step_s": time.perf_counter() - start,
            "forward_s": gradients.forward.take(),
        }


def _own_windows(
    state: TrainState, config: TrainConfig, gradients: BatchGradients
) -> NDArray[np.int64]:
    """Return the windows of a batch that this process computes, micro-batch by micro-batch."""
    numbers, size = np.array(own_numbers(state, config, gradients)), state.micro_batch_size
    return (numbers[:, None] * size + np.arange(size)).ravel()


def validation_loss(state: TrainState, valid: Split, config: TrainConfig) -> float:
    """Return the loss, in nats, on the batches that every validation of the run looks at."""
    size = state.micro_batch_size
    dtype, most = config.dtype, config.eval_batches * config.batch_size // size
    sums = evaluate(
        state.model, valid, size, max_batches=most, dtype=dtype, processes=state.processes
    )
    return loss_nats(sums)


def due(step: int, interval: int) -> bool:
    """Return whether an action of every `interval` steps is due after this step."""
    return step % interval == 0
