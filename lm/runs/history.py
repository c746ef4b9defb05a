"""The curves of a training run: bounded in size, and a pure function of its steps."""

import csv
import io
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

MAX_ROWS = 1000
COLUMNS = ("step", "tokens", "train_loss", "valid_loss", "learning_rate", "grad_norm")
_SMOOTHING = 0.95  # of the average loss: it looks back about 20 steps


class History:
    """One row per `interval` steps; at MAX_ROWS rows neighbours merge and the interval doubles.

    Losses and gradient norms are means over the row's steps (of its two halves, where rows have
    merged), in nats and as L2 norms; the step, the learning rate and the validation loss are the
    row's last. Means leave out skipped steps. The rows depend only on the steps: not on the
    planned length, and not on where a run was interrupted.
    """

    def __init__(self) -> None:
        self.interval = 1
        self.rows: list[dict[str, Any]] = []
        self.pending: list[dict[str, Any]] = []
        self._sum = self._weight = 0.0

    def add(self, record: dict[str, Any]) -> None:
        """Add the record of a step; keys beyond COLUMNS are left out."""
        row = {key: record.get(key) for key in COLUMNS}
        if "skipped" in record:
            row |= {"train_loss": None, "grad_norm": None}
        else:
            self._sum = _SMOOTHING * self._sum + record["train_loss"]
            self._weight = _SMOOTHING * self._weight + 1
        self.pending.append(row)
        if len(self.pending) == self.interval:
            self.rows.append(_merge(self.pending))
            self.pending = []
        if len(self.rows) == MAX_ROWS:
            pairs = zip(self.rows[::2], self.rows[1::2], strict=True)
            self.rows = [_merge(list(pair)) for pair in pairs]
            self.interval *= 2

    @property
    def average_loss(self) -> float:
        """Exponential moving average of the training loss, in nats; a true mean from the start."""
        return self._sum / self._weight if self._weight else math.nan

    def to_csv(self, clock: "Clock | None" = None) -> bytes:
        """Return the rows as CSV; with a clock, add their times.

        A missing validation loss or time becomes nan, which plots leave out.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS if clock is None else (*COLUMNS, "elapsed_s"))
        for row in self.rows + ([_merge(self.pending)] if self.pending else []):
            time = () if clock is None else (clock.elapsed_s.get(row["step"]),)
            writer.writerow(_cell(value) for value in (*(row[c] for c in COLUMNS), *time))
        return text.getvalue().encode()

    def state(self) -> dict[str, Any]:
        """Return all of it as JSON values, for the checkpoint."""
        return dict(vars(self))

    @classmethod
    def restore(cls, state: dict[str, Any]) -> "History":
        """Return the history that `state` was taken from."""
        history = cls()
        vars(history).update(state)
        return history


class Clock:
    """The seconds of training up to each step, summed over the interruptions of the run.

    It stands beside the history, never in it: a checkpoint must hold no clock. If the times up to
    a resumed step are lost, later ones stay unknown.
    """

    def __init__(self, elapsed_s: Mapping[int, float] | None = None, runs: bool = True):
        """Go on from the last of these seconds by step; with `runs` False record no more."""
        self.elapsed_s, self.runs = dict(elapsed_s or {}), runs
        self._before_s = max(self.elapsed_s.values(), default=0.0)

    def tick(self, step: int, seconds: float, history: History) -> None:
        """Record when a step was done, in seconds since this process began to train."""
        if not self.runs:
            return
        self.elapsed_s[step] = self._before_s + seconds
        if len(self.elapsed_s) >= 2 * MAX_ROWS:
            kept = {step, *(row["step"] for row in history.rows)}
            self.elapsed_s = {s: time for s, time in self.elapsed_s.items() if s in kept}

    @classmethod
    def from_csv(cls, text: bytes, resumed_at: int | None = None) -> "Clock":
        """Read the times that History.to_csv wrote, up to a step; read none from a torn file."""
        times: dict[int, float] = {}
        with suppress(KeyError, TypeError, ValueError, csv.Error):
            for row in csv.DictReader(text.decode().splitlines()):
                if math.isfinite(elapsed_s := float(row["elapsed_s"])):
                    times[int(row["step"])] = elapsed_s
        if resumed_at is None:
            return cls(times)
        until = {step: elapsed_s for step, elapsed_s in times.items() if step <= resumed_at}
        return cls(until, runs=max(times, default=0) >= resumed_at)


def _cell(value: int | float | None) -> str:
    if value is None:
        return "nan"
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _merge(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def known(column: str) -> list[Any]:
        return [row[column] for row in rows if row[column] is not None]

    def mean(column: str) -> float | None:
        values = known(column)
        return sum(values) / len(values) if values else None

    valid_loss = next(reversed(known("valid_loss")), None)
    means = {column: mean(column) for column in ("train_loss", "grad_norm")}
    return rows[-1] | means | {"valid_loss": valid_loss}
