"""One training run from its first step to its published files, killable at any point between.

Run(...)  locks .../lm-resume/<fingerprint>/ and restores the newest intact checkpoint
log       history, console, best checkpoint
save      a checkpoint; a caught signal then ends the process
publish   models and metrics appear, the resume directory goes
"""

import copy
import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from lm.checkpoint import (
    ResumeDirectory,
    commit,
    load_checkpoint,
    read_extra,
    save_checkpoint,
    save_model,
    verify,
)
from lm.config import RuntimeConfig
from lm.console import Progress, duration, say
from lm.device import performance
from lm.errors import Diverged, InputError
from lm.files import atomic_write, sha256_file, sha256_json, write_json
from lm.history import History
from lm.signals import CatchSignals
from lm.tokenizer import Tokenizer
from lm.train import Record, TrainConfig, TrainState


class Run:
    """The life of one training run; a context manager."""

    def __init__(
        self,
        state: TrainState,
        config: TrainConfig,
        runtime: RuntimeConfig,
        inputs: dict[str, Any],
        unfinished: Path,
        resume_from: Path | None = None,
    ):
        """Lock the run's folder under `unfinished` and bring `state` to where the run was.

        `inputs`, with the settings of model and training, is all that decides the result: only a
        run that agrees in every part of it is resumed. Raises Busy if another process trains this
        run, InputError for a checkpoint to continue that does not fit.
        """
        self.state, self.config, self.runtime = state, config, runtime
        self.identity = {"model": asdict(state.model.config), "train": asdict(config), **inputs}
        if resume_from is not None:
            self._check_continuation(resume_from)
            self.identity["resume_from"] = sha256_file(resume_from)
        folder = unfinished / sha256_json(self.identity)[:32]
        self.directory = ResumeDirectory(folder, runtime.keep_checkpoints)
        _report_others(folder)
        self.history = History()
        self.best: dict[str, Any] = {"valid_loss": None, "step": None, "misses": 0}
        self.valid_loss: float | None = None
        self.step_seconds: list[float] = []
        self.last_saved: int | None = None
        if not self._resume() and resume_from is not None:
            self._continue(resume_from)
        tokens = config.batch_size * state.model.config.context_length
        self.progress = Progress(state.step, config.max_steps, runtime.log_interval, tokens)
        self.signals = CatchSignals()

    def __enter__(self) -> "Run":
        self.signals.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.progress.close()
        self.directory.unlock()
        self.signals.__exit__(kind, error, traceback)
        if isinstance(error, Diverged):
            good = "no checkpoint yet" if self.last_saved is None else f"step {self.last_saved}"
            error.args = (f"{error}; last good checkpoint: {good}",)

    def _resume(self) -> bool:
        """Restore the newest checkpoint of this very run that is intact; False if there is none."""
        for path, fault in self.directory.intact():
            fault = fault or self._fault(path)
            if fault is not None:
                say(f"warning: {fault}; going on from the checkpoint before it")
                continue
            self._restore(path)
            self.last_saved = self.state.step
            say(f"Resumed at step {self.state.step}")
            return True
        return False

    def _fault(self, path: Path) -> str | None:
        """Why an undamaged checkpoint must not be resumed."""
        extra = read_extra(path)
        for part, value in _as_json(self.identity).items():
            if extra["identity"].get(part) != value:
                return f"{path}: of another run: {part} differs"
        if extra["best"]["step"] is not None:
            try:
                verify(self.directory.best(extra["best"]["step"]))
            except InputError as error:
                return str(error)
        return None

    def _check_continuation(self, path: Path) -> None:
        """Raise InputError unless a checkpoint is whole and of the same model and data."""
        verify(path)
        extra = read_extra(path)
        if "identity" not in extra:
            raise InputError(f"{path}: not saved by stage train; use lm.checkpoint.load_checkpoint")
        for part in ("model", "tokenizer", "tokens"):
            ours, theirs = self.identity[part], extra["identity"][part]
            if ours != theirs:
                difference = _difference(part, ours, theirs)
                raise InputError(f"{path}: made with other {part}: {difference}")
        if extra["iteration"] >= self.config.max_steps:
            raise InputError(
                f"{path}: is at step {extra['iteration']}, train.max_steps = "
                f"{self.config.max_steps}; nothing is left to do, raise train.max_steps"
            )

    def _continue(self, path: Path) -> None:
        """Start from another run's checkpoint, with the settings of this one."""
        settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.state.optimizer.param_groups
        ]
        self._restore(path)
        for group, ours in zip(self.state.optimizer.param_groups, settings, strict=True):
            group.update(ours)
        self.best["misses"] = 0
        best = path.with_name("best.safetensors")  # as publish names it
        if best.exists() and read_extra(best)["iteration"] == self.best["step"]:
            verify(best)
            shutil.copy(best, self.directory.best(self.best["step"]))
            commit(self.directory.best(self.best["step"]))
        else:
            self.best = {"valid_loss": None, "step": None, "misses": 0}
        say(f"Continuing {path} from step {self.state.step}")

    def _restore(self, path: Path) -> None:
        self.state.step = load_checkpoint(path, self.state.model, self.state.optimizer)
        extra = read_extra(path)
        if extra["scaler"]:
            self.state.scaler.load_state_dict(extra["scaler"])
        self.history = History.restore(extra["history"])
        self.best, self.valid_loss = extra["best"], extra["valid_loss"]

    def _extra(self) -> dict[str, Any]:
        return {
            "identity": self.identity,
            "scaler": self.state.scaler.state_dict(),
            "history": self.history.state(),
            "best": self.best,
            "valid_loss": self.valid_loss,
        }

    @property
    def finished(self) -> bool:
        """Whether the last step is done or validation has stopped improving."""
        return self.state.step >= self.config.max_steps or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether train.early_stopping validations have passed without a new best."""
        patience = self.config.early_stopping
        return patience is not None and bool(self.best["misses"] >= patience)

    def log(self, record: Record) -> None:
        """Take in a finished step, with "valid_loss" if it was validated."""
        self.history.add(record)
        self.step_seconds.append(record["step_s"])
        self.progress.show(record, self.history.average_loss)
        if "valid_loss" in record:
            self.valid_loss = record["valid_loss"]
            if not math.isfinite(self.valid_loss):
                raise Diverged(
                    f"validation loss is {self.valid_loss} at step {self.state.step}; "
                    "lower train.lr"
                )
            if self.best["valid_loss"] is None or self.valid_loss < self.best["valid_loss"]:
                self.best = {"valid_loss": self.valid_loss, "step": self.state.step, "misses": 0}
                self.directory.save_best(
                    self.state.model, self.state.optimizer, self.state.step, self._extra()
                )
            else:
                self.best["misses"] += 1

    def save_if_due(self) -> None:
        """Write a checkpoint at its interval; on a signal write one and leave."""
        if due(self.state.step, self.runtime.checkpoint_interval) or self.signals.caught:
            self.directory.save(
                self.state.model, self.state.optimizer, self.state.step, self._extra()
            )
            self.last_saved = self.state.step
        self.signals.leave(f"stopped, saved at step {self.state.step}; run again to go on")

    def publish(self, tokenizer: Tokenizer, models: Path, metrics: Path) -> None:
        """Write the outputs; only then delete what a resumed run would need.

        models/model holds the last weights, or with early stopping the best.
        """
        state, checkpoints = self.state, models / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        last, best = checkpoints / "last.safetensors", checkpoints / "best.safetensors"
        assert self.best["step"] is not None  # the last step is always validated
        verify(self.directory.best(self.best["step"]))
        shutil.copy(self.directory.best(self.best["step"]), best)
        commit(best)
        atomic_write(metrics / "curves.csv", self.history.to_csv())
        write_json(
            metrics / "train.json",
            {
                "step": state.step,
                "tokens": state.step * self.config.batch_size * state.model.config.context_length,
                "parameters": state.model.num_parameters(),
                "train_loss": self.history.average_loss,
                "valid_loss": self.valid_loss,
                "best_valid_loss": self.best["valid_loss"],
                "best_step": self.best["step"],
            },
        )
        chosen = state.model
        if self.config.early_stopping is not None:
            chosen = copy.deepcopy(state.model)
            load_checkpoint(best, chosen)
        save_model(chosen, tokenizer, models / "model")
        # at the end: a continued run that is killed before still finds what it continues
        save_checkpoint(state.model, state.optimizer, state.step, last, self._extra())
        commit(last)
        self.directory.remove()
        say(
            f"Final loss {self.history.average_loss:.4f}, validation {self.valid_loss:.4f}, "
            f"in {duration(self.progress.elapsed_s())}; model in {models / 'model'}, "
            f"checkpoints in {checkpoints}, curves in {metrics / 'curves.csv'}"
        )

    def write_performance(self, device: torch.device, metrics: Path) -> None:
        """Write metrics/performance.json, which no stage declares: clocks do not reproduce."""
        if self.step_seconds:
            tokens = self.config.batch_size * self.state.model.config.context_length
            flops = self.state.model.flops_per_token()
            speed = performance(device, self.config.dtype, self.step_seconds, tokens, flops)
            write_json(metrics / "performance.json", speed)


def due(step: int, interval: int) -> bool:
    """Whether something done every `interval` steps is done after this one."""
    return step % interval == 0


def _report_others(folder: Path) -> None:
    """Say how much unfinished runs with other settings, data or code keep on disk."""
    others = [path for path in folder.parent.iterdir() if path != folder and path.is_dir()]
    if others:
        size = sum(_size_bytes(file) for path in others for file in path.glob("*"))
        say(f"{len(others)} other unfinished runs keep {size / 1e6:.0f} MB in {folder.parent}")


def _size_bytes(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # that run has just finished
        return 0


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """The value as it comes back from a checkpoint."""
    return dict(json.loads(json.dumps(value)))


def _difference(part: str, ours: Any, theirs: Any) -> str:
    if not isinstance(ours, dict):
        return f"sha256 {theirs} there, {ours} here"
    return ", ".join(
        f"{part}.{key} = {theirs.get(key)} there, {value} here"
        for key, value in ours.items()
        if theirs.get(key) != value
    )
