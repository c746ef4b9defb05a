"""The record of a run, which its checkpoints keep beside the state."""

import math
from dataclasses import asdict, replace
from typing import Any

from lm.base.errors import Diverged
from lm.base.run_id import MICRO_BATCH_SIZES, NUM_PROCESSES
from lm.base.settings import BY_TREE, PARALLEL, TrainConfig
from lm.base.tables import DIVERGED
from lm.runs.checkpoint import Extra, weights_sha256
from lm.runs.history import Clock, History
from lm.runs.saved_run import Best, Identity, SavedRun
from lm.train.state import Record, TrainState


class Logbook:
    """The identity of a run, its changes, its curves and its best validation, up to a step.

    `changes` holds the micro-batch sizes, which memory decides, and the numbers of processes where
    they change the rounding; each value by the first step that had it.
    """

    def __init__(self, state: TrainState, config: TrainConfig, identity: Identity):
        self.state, self.config, self.identity = state, config, identity
        self.history, self.clock = History(), Clock()
        self.best = Best(valid_loss=None, step=None, misses=0)
        self.valid_loss: float | None = None
        self.weights: dict[str, str] = {}  # hash of the weights at each validation, by step
        self.begin_changes()

    def begin_changes(self) -> None:
        """Record the present micro-batch size and number of processes, from the next step on."""
        first = str(self.state.step + 1)
        self.changes = {MICRO_BATCH_SIZES: {first: self.state.micro_batch_size}}
        if PARALLEL[self.config.parallel].several and not BY_TREE[self.config.reduction]:
            self.changes[NUM_PROCESSES] = {first: self.state.processes.size}

    def add_change(self, part: str, value: int, step: int) -> None:
        """Record a new value of a part from a step on; do nothing if it is the same."""
        values = self.changes.get(part, {})
        if values and values[max(values, key=int)] != value:
            values[str(step)] = value

    def provenance(self) -> dict[str, Any]:
        """Return identity and changes, for models/model/provenance.json and checkpoints."""
        return self.identity.parts() | self.changes

    def add(self, record: Record, elapsed_s: float) -> None:
        """Add a finished step; `elapsed_s` counts from when this process began to train."""
        self.add_change(MICRO_BATCH_SIZES, record["micro_batch_size"], record["step"])
        self.add_change(NUM_PROCESSES, self.state.processes.size, record["step"])
        self.history.add(record)
        self.clock.tick(record["step"], elapsed_s, self.history)

    def add_validation(self, loss: float) -> None:
        """Add the validation loss of the last step. Raises Diverged if it is not finite."""
        self.valid_loss = loss
        if not math.isfinite(loss):
            raise Diverged(f"validation loss is {loss} at step {self.state.step}; lower train.lr")
        self.weights[str(self.state.step)] = weights_sha256(self.state.model)
        if self.best.valid_loss is None or loss < self.best.valid_loss:
            self.best = Best(loss, self.state.step, misses=0)
        else:
            self.best = replace(self.best, misses=self.best.misses + 1)

    @property
    def finished(self) -> bool:
        """True once the last step is done or validation has stopped improving."""
        patience = self.config.early_stopping
        stopped_early = patience is not None and self.best.misses >= patience
        return self.state.step >= self.config.max_steps or stopped_early

    @property
    def step(self) -> int:
        """The last step of the history; a GPU may be some steps ahead of it."""
        rows = self.history.pending or self.history.rows
        return int(rows[-1]["step"]) if rows else self.state.step

    def extra(self) -> Extra:
        """Return the part of the record that a checkpoint keeps."""
        return {
            "identity": self.provenance(),
            "scaler": self.state.scaler.state_dict(),
            "history": self.history.state(),
            "best": asdict(self.best),
            "valid_loss": self.valid_loss,
            "weights": self.weights,
            "skipped": [self.state.skipped_steps, self.state.skipped_in_a_row],
        }

    def restore(self, saved: SavedRun) -> None:
        """Restore the record from a checkpoint, except identity and changes."""
        if saved.scaler is not None:
            self.state.scaler.load_state_dict(asdict(saved.scaler))
        self.history = History.restore(asdict(saved.history))
        self.best, self.valid_loss = saved.best, saved.valid_loss
        self.weights = dict(saved.weights)
        self.state.skipped_steps, self.state.skipped_in_a_row = saved.skipped

    def figures(self, diverged_at: int | None = None) -> dict[str, Any]:
        """Return the figures of the last step, for metrics/train.json."""
        state, average, valid_loss = self.state, self.history.average_loss, self.valid_loss
        figures: dict[str, Any] = {
            "step": self.step,
            "tokens": self.step * self.config.tokens_per_step(state.model.config),
            "parameters": state.model.num_parameters(),
            "micro_batch_size": state.micro_batch_size,
            "train_loss": average if math.isfinite(average) else None,
            "valid_loss": valid_loss if math.isfinite(valid_loss or 0.0) else None,
            "best_valid_loss": self.best.valid_loss,
            "best_step": self.best.step,
            "skipped_steps": state.skipped_steps,
        }
        return figures if diverged_at is None else figures | {DIVERGED: diverged_at}
