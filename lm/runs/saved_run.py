"""Read the record of a run from a checkpoint, and check all of it before use."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated

from lm.base.errors import InputError
from lm.base.migrations import ADDED, migrated
from lm.base.sections import NOT_EMPTY, NOT_NEGATIVE, POSITIVE, Bound, Count, read_section
from lm.runs.checkpoint import Extra, read_extra

Number = Annotated[int, NOT_NEGATIVE]
BY_STEP = Bound(lambda x: all(map(str.isdecimal, x)), "must have steps as its keys")
TWO = Bound(lambda x: len(x) == 2, "must be two numbers")


@dataclass(frozen=True)
class _Row:
    """A row of the history: see lm.runs.history."""

    step: Count
    tokens: Number
    train_loss: float | None
    valid_loss: float | None
    learning_rate: float
    grad_norm: float | None


@dataclass(frozen=True)
class _History:
    interval: Count
    rows: list[_Row]
    pending: list[_Row]
    _sum: float
    _weight: float


@dataclass(frozen=True)
class Best:
    """The best validation up to a step, and the number of later ones that were not better."""

    valid_loss: float | None
    step: Count | None
    misses: Number


@dataclass(frozen=True)
class _Scaler:
    scale: Annotated[float, POSITIVE]
    growth_factor: float
    backoff_factor: float
    growth_interval: int
    _growth_tracker: int


@dataclass(frozen=True)
class Identity:
    """All that decides the result of a run: only a run that agrees in every part is resumed.

    It becomes the model's provenance. It holds no clock, no path and no commit, or the outputs
    would not reproduce.
    """

    model: Extra
    train: Extra
    inputs: Extra
    code: Extra
    environment: Extra
    resume_from: str | None  # SHA-256 of the checkpoint of another run that it continues

    def parts(self) -> Extra:
        """Return it as files keep it: without resume_from if it continues no other run."""
        return {part: value for part, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class SavedIdentity(Identity):
    """An identity and the changes of a run: see lm.runs.logbook."""

    micro_batch_sizes: Annotated[dict[str, Count], NOT_EMPTY, BY_STEP]
    num_processes: Annotated[dict[str, Count], BY_STEP] | None


@dataclass(frozen=True)
class SavedRun:
    """The record that stage train saves beside model and optimizer: see lm.runs.logbook."""

    step: Number
    identity: SavedIdentity
    scaler: _Scaler | None
    history: _History
    best: Best
    valid_loss: float | None
    weights: Annotated[dict[str, str], BY_STEP]
    skipped: Annotated[list[Number], TWO]


def read_saved_run(path: Path) -> SavedRun:
    """Return the record of a run from a checkpoint without reading a tensor.

    Add settings that an earlier version did not have. Raises InputError for a record that no
    training saves.
    """
    extra = read_extra(path)
    identity = extra.get("identity")
    if not isinstance(identity, dict):
        raise InputError(
            f"{path}: not saved by stage train; use lm.runs.checkpoint.load_checkpoint"
        )
    identity |= {part: migrated(part, identity[part]) for part in ADDED if part in identity}
    known = {key.name: extra[key.name] for key in fields(SavedRun) if key.name in extra}
    known["step"] = step = extra["iteration"]
    known["identity"] = {"num_processes": None, "resume_from": None} | identity
    known["scaler"] = extra.get("scaler") or None
    run = read_section(SavedRun, {"extra": known}, "extra", str(path))
    history, best = run.history, run.best
    merged = len(history.rows) * history.interval
    steps = [*range(history.interval, merged + 1, history.interval)]
    steps += range(merged + 1, step + 1)
    if merged > step or [row.step for row in (*history.rows, *history.pending)] != steps:
        raise InputError(f"{path}: its history is not of {step} steps")
    if (best.step is None) != (best.valid_loss is None) or (
        best.step is not None and not (best.step <= step and str(best.step) in run.weights)
    ):
        raise InputError(f"{path}: extra.best = {extra['best']}: not one of its {step} steps")
    skipped, in_a_row = run.skipped
    if not in_a_row <= skipped <= step:
        raise InputError(f"{path}: extra.skipped = {run.skipped}: more than its {step} steps")
    return run
