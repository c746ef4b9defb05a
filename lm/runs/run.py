"""One training run from its first step to its published files, killable at any point between.

Run(...)  locks .../lm-resume/<fingerprint>/ and restores the newest intact checkpoint
log       history, console, metrics that can be watched, whether a checkpoint is due
save      a checkpoint, in the background; a caught signal then ends the process
publish   models and metrics appear; the resume directory keeps the last state, because a kill
          before DVC has recorded the outputs would otherwise lose the training

Of several processes each has its Run, and all decide alike: what could differ (signals, faults)
they exchange at each step. Rank 0 alone writes and speaks; of a checkpoint each writes a share.
"""

import json
import math
import statistics
from collections import deque
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from lm.base.config import RuntimeConfig
from lm.base.console import Progress, count, duration, say
from lm.base.errors import Diverged, EnvironmentFault, InputError, Interrupted
from lm.base.files import atomic_copy, atomic_write, require_file, sha256_file, write_json
from lm.base.runs import MICRO_BATCH_SIZES, NUM_PROCESSES, clock_file, decided, run_folder
from lm.base.settings import TrainConfig
from lm.base.signals import CatchSignals
from lm.base.tables import DIVERGED, ended_worse
from lm.data.tokenizer import Tokenizer
from lm.machine.gauges import performance
from lm.model.model_folder import save_model
from lm.model.transformer import TransformerLM
from lm.plan.plan import Forecast
from lm.runs.checkpoint import (
    as_one_file,
    commit,
    load_checkpoint,
    read_run,
    verify,
    weights_sha256,
)
from lm.runs.history import Clock, History
from lm.runs.resume import ResumeDirectory, differences, few, kept_checkpoints, nearest, publishing
from lm.train.loop import due
from lm.train.state import Record, TrainState

REFRESH_S = 2.0  # between two refreshes of the metrics that can be watched
WATCHED, SLOW = 20, 0.5  # steps; a rank is slow if its forward pass takes so much longer


class Run:
    """The life of one training run; a context manager."""

    def __init__(
        self,
        state: TrainState,
        config: TrainConfig,
        runtime: RuntimeConfig,
        made_of: dict[str, Any],
        unfinished: Path,
        resume_from: Path | None = None,
        live: Path | None = None,
    ):
        """Lock the run's folder under `unfinished` and bring `state` to where the run was.

        `made_of` (inputs, code, environment), with the settings of model and training, is all that
        decides the result: it is recorded as the model's provenance, and only a run that agrees
        in every part of it is resumed. It holds no clock, no path and no commit, or the outputs
        would not reproduce. Recorded beside it are the sizes of micro-batches, which memory
        decided, and where it moves the last bits the number of processes: they may change.
        A resumed run keeps the size it had, unless that exceeds state.micro_batch_size. With `live`
        the metrics can be watched in that folder during training.
        Raises Busy if another process trains this run, InputError for a checkpoint to continue
        that does not fit.
        """
        self.state, self.config, self.runtime = state, config, runtime
        self.processes, self.live = state.processes, live if state.processes.leads else None
        self.identity = {"model": asdict(state.model.config), "train": asdict(config), **made_of}
        if resume_from is not None:
            self.processes.lead(lambda: self._check_continuation(resume_from))
            self.identity["resume_from"] = sha256_file(resume_from)
        folder = run_folder(unfinished, self.identity)
        self.directory = ResumeDirectory(folder, runtime.keep_checkpoints, self.processes)
        self.history, self.clock = History(), Clock()
        self.clock_file = clock_file(unfinished, self.identity)
        self._begin_notes()
        self.best: dict[str, Any] = {"valid_loss": None, "step": None, "misses": 0}
        self.valid_loss: float | None = None
        self.weights: dict[str, str] = {}  # their hash at each validation, by step
        self.step_seconds: list[float] = []
        self.forward_seconds: deque[list[float]] = deque(maxlen=1000)  # of each step, by rank
        self.refreshed_s = -math.inf
        try:
            resumed = self._resume()
            if self.processes.leads:
                _report_others(folder, None if resumed else decided(self.identity))
            if not resumed and resume_from is not None:
                self._continue(resume_from)
                self._begin_notes()
        except BaseException:
            self.directory.unlock()
            raise
        tokens = config.batch_size * state.model.config.context_length
        self.progress = Progress(state.step, config.max_steps, runtime.log_interval, tokens)
        self.signals = CatchSignals()
        self.agreed_signal: int | None = None  # caught by one of the processes, and known to all

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
        if isinstance(error, Diverged) and self.processes.leads:
            curves = self._keep_curves()
            last = f"last good checkpoint: {self._last_good()}"
            error.args = (f"{error}; {last}; curves up to there: {curves}",)

    def _keep_curves(self) -> Path:
        """Write the curves of a run that has diverged; returns where they are.

        Its clock file is there in any case: DVC deletes the workspace of an experiment that fails.
        """
        self._write_times()
        if self.live is None:
            return self.clock_file
        spoilt = self.valid_loss is not None and not math.isfinite(self.valid_loss)
        with suppress(EnvironmentFault):
            self._write_metrics(self.live, diverged_at=self.state.step + (0 if spoilt else 1))
        here = self.clock_file.resolve().is_relative_to(Path.cwd())
        return self.live / "curves.csv" if here else self.clock_file

    def _last_good(self) -> str:
        for path, fault in kept_checkpoints(self.directory.folder):
            with suppress(InputError):
                if fault is None:
                    return f"step {read_run(path)['iteration']}"
        return "no checkpoint yet"

    def _begin_notes(self) -> None:
        """Note what a run may change on its way, as of the first step."""
        first = str(self.state.step + 1)
        self.identity[MICRO_BATCH_SIZES] = {first: self.state.micro_batch_size}
        if self.config.parallel != "none" and self.config.reduction == "sum":
            self.identity[NUM_PROCESSES] = {first: self.processes.size}

    def _note(self, what: str, value: int, step: int) -> None:
        """Note that from a step on it is another."""
        notes = self.identity.get(what, {})
        if notes and notes[max(notes, key=int)] != value:
            notes[str(step)] = value

    def _resume(self) -> bool:
        """Restore the newest checkpoint of this very run that is intact; False if there is none."""
        for path, fault in kept_checkpoints(self.directory.folder, self.processes):
            try:
                fault = fault or self._fault(path)
                theirs = {} if fault else self._restore(path)["identity"]
            except InputError as error:
                fault = str(error)
            if fault is not None:
                say(f"warning: {fault}; passed over")
                continue
            self._keep_windows_at_once(theirs[MICRO_BATCH_SIZES])
            if NUM_PROCESSES in theirs:
                self.identity[NUM_PROCESSES] = dict(theirs[NUM_PROCESSES])
            finished = f"; it is finished: delete {path.parent} to train anew"
            say(f"Resumed at step {self.state.step}{finished if self.finished else ''}")
            return True
        return False

    def _keep_windows_at_once(self, sizes: dict[str, int]) -> None:
        """Go on with the micro-batches that the run had, or with what fits if that is less."""
        before, fitting = sizes[max(sizes, key=int)], self.state.micro_batch_size
        share = self.config.batch_size // self.processes.size  # another number may not divide it
        fitting = max(n for n in range(1, min(before, fitting) + 1) if share % n == 0)
        self.identity[MICRO_BATCH_SIZES] = dict(sizes)
        self.state.micro_batch_size = before
        if fitting < before and not self.finished:
            self.state.micro_batch_size = fitting
            why = "no longer fit" if share % before == 0 else f"are no part of {share}"
            say(f"{count(before, 'window')} at a time {why}: from here on {fitting}")
            self._note(MICRO_BATCH_SIZES, fitting, self.state.step + 1)

    def _fault(self, path: Path) -> str | None:
        """Why an undamaged checkpoint must not be resumed."""
        extra = read_run(path)
        ours, theirs = _as_json(decided(self.identity)), decided(extra["identity"])
        if ours != theirs:
            return f"{path}: of another run: {few(differences(theirs, ours))}"
        step = extra["iteration"]
        if path.stem != self.directory.path(step).stem or step > self.config.max_steps:
            return f"{path}: is at step {step}: not that of its name, or beyond train.max_steps"
        if extra["best"]["step"] is not None:
            try:
                best = self.directory.path(extra["best"]["step"])
                self.processes.together(lambda: verify(best, self.processes))
            except InputError as error:
                return str(error)
        return None

    def _check_continuation(self, path: Path) -> None:
        """Raise InputError unless a checkpoint is a file, whole, of the same model and data."""
        require_file(path)
        verify(path)
        extra = read_run(path)
        for part in ("model", "inputs"):
            ours, theirs = self.identity[part], extra["identity"].get(part, {})
            if ours != theirs:
                raise InputError(f"{path}: made with another {_difference(part, ours, theirs)}")
        if extra["best"]["step"] is not None:
            _best_beside(path)
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
        if self.best["step"] is not None:
            self.processes.lead(lambda: self._adopt(_best_beside(path)))
        say(f"Continuing {path} from step {self.state.step}")

    def _adopt(self, best: Path) -> None:
        """Keep another run's best checkpoint, a file, as one of this run's."""
        file = self.directory.folder / f"step-{self.best['step']:08d}.safetensors"
        atomic_copy(best, file)
        commit(file)

    def _restore(self, path: Path) -> dict[str, Any]:
        """Bring everything to where a checkpoint was; returns what was saved beside the state."""
        extra = read_run(path)
        self.state.step = load_checkpoint(
            path, self.state.model, self.state.optimizer, self.processes
        )
        if extra["scaler"]:
            self.state.scaler.load_state_dict(extra["scaler"])
        self.history = History.restore(extra["history"])
        times = clock_file(self.directory.folder.parent, extra["identity"])
        text = times.read_bytes() if times.is_file() else b""
        self.clock = Clock.from_csv(text, resumed_at=self.state.step)
        self.best, self.valid_loss = extra["best"], extra["valid_loss"]
        self.weights = extra["weights"]
        self.state.skipped_steps, self.state.skipped_in_a_row = extra["skipped"]
        return extra

    def _extra(self) -> dict[str, Any]:
        return {
            "identity": self.identity,
            "scaler": self.state.scaler.state_dict(),
            "history": self.history.state(),
            "best": self.best,
            "valid_loss": self.valid_loss,
            "weights": self.weights,
            "skipped": [self.state.skipped_steps, self.state.skipped_in_a_row],
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
        """Take in a finished step, with "valid_loss" if it was validated.

        Of several processes, whichever caught a signal or failed to save, all learn it here.
        """
        self._note(MICRO_BATCH_SIZES, self.state.micro_batch_size, record["step"])
        self._note(NUM_PROCESSES, self.processes.size, record["step"])
        forward_s, signals, failed = self.processes.gather_numbers(
            [record["forward_s"], self.signals.caught or 0, self.directory.failed]
        ).T
        # one that comes from here on waits for the next step: all must leave at the same
        self.agreed_signal = int(signals.max()) or None
        self.forward_seconds.append(forward_s.tolist())
        self.history.add(record)
        self.step_seconds.append(record["step_s"])
        elapsed_s = self.progress.elapsed_s()
        self.clock.tick(record["step"], elapsed_s, self.history)
        remark = ""
        if due(record["step"], self.runtime.log_interval):
            remark = _slow_rank(list(self.forward_seconds), self.step_seconds)
        self.progress.show(record, self.history.average_loss, remark)
        if "skipped" in record:
            say(f"warning: step {record['step']} skipped: {record['skipped']}")
        if "valid_loss" in record:
            self.valid_loss = record["valid_loss"]
            if not math.isfinite(self.valid_loss):
                raise Diverged(
                    f"validation loss is {self.valid_loss} at step {self.state.step}; "
                    "lower train.lr"
                )
            self.weights[str(self.state.step)] = weights_sha256(self.state.model)
            if self.best["valid_loss"] is None or self.valid_loss < self.best["valid_loss"]:
                self.best = {"valid_loss": self.valid_loss, "step": self.state.step, "misses": 0}
            else:
                self.best["misses"] += 1
        if failed.any():
            self.directory.wait()
        if self.live is not None and (
            "valid_loss" in record or elapsed_s - self.refreshed_s >= REFRESH_S
        ):
            with suppress(EnvironmentFault):  # only to be watched: no reason to stop
                self._write_metrics(self.live, durable=False)
            self.refreshed_s = elapsed_s

    @property
    def save_due(self) -> bool:
        """Whether this step must be saved: at the interval, a new best, the end, or a signal."""
        step = self.state.step
        at_interval = due(step, self.runtime.checkpoint_interval)
        new_best = self.best["step"] == step
        return at_interval or new_best or self.finished or self.agreed_signal is not None

    def save(self) -> None:
        """Start writing a checkpoint; after a signal wait for it and leave."""
        if self.processes.leads:
            self._write_times()
        self.directory.save(self.state.model, self.state.optimizer, self.state.step, self._extra())
        if self.agreed_signal is not None:
            self.directory.wait()
            message = f"stopped, saved at step {self.state.step}; run again to go on"
            raise Interrupted(self.agreed_signal, message)

    def publish(self, tokenizer: Tokenizer, models: Path, metrics: Path) -> None:
        """Write the outputs. models/model holds the last weights, or with early stopping the best.

        It can be repeated: the resume directory still holds the state of the last step.
        """
        self.directory.wait()
        if self.processes.leads:  # the others have nothing to wait for
            with publishing(self.directory.folder.parent):
                self._publish(tokenizer, models, metrics)

    def _publish(self, tokenizer: Tokenizer, models: Path, metrics: Path) -> None:
        """From checkpoints alone: of the model this process may hold a share."""
        state, checkpoints = self.state, models / "checkpoints"
        last, best = checkpoints / "last.safetensors", checkpoints / "best.safetensors"
        assert self.best["step"] is not None  # the last step is always validated
        for step in (self.best["step"], state.step):
            verify(self.directory.path(step))
        _copy_as_file(self.directory.path(self.best["step"]), best)
        figures = self._write_metrics(metrics)
        step = state.step if self.config.early_stopping is None else self.best["step"]
        chosen = TransformerLM(state.model.config)
        load_checkpoint(self.directory.path(step), chosen)
        save_model(chosen, tokenizer, models / "model")
        write_json(models / "model" / "provenance.json", self.identity)
        # at the end: a continued run that is killed before still finds what it continues
        _copy_as_file(self.directory.path(state.step), last)
        say(
            f"Final loss {self.history.average_loss:.4f}, validation {self.valid_loss:.4f}, "
            f"in {duration(self.progress.elapsed_s())}; model in {models / 'model'}, "
            f"checkpoints in {checkpoints}, curves in {metrics / 'curves.csv'}"
        )
        if worse := ended_worse(figures, self.config.early_stopping is not None):
            say(f"warning: {worse}")

    def _write_times(self) -> None:
        with suppress(EnvironmentFault):  # nobody's result depends on the times
            atomic_write(self.clock_file, self.history.to_csv(self.clock), durable=False)

    def _write_metrics(
        self, metrics: Path, durable: bool = True, diverged_at: int | None = None
    ) -> dict[str, Any]:
        """Write the curves, the last step's figures, and the times, which no stage declares.

        Returns the figures.
        """
        state, average, valid_loss = self.state, self.history.average_loss, self.valid_loss
        figures: dict[str, Any] = {
            "step": state.step,
            "tokens": state.step * self.config.batch_size * state.model.config.context_length,
            "parameters": state.model.num_parameters(),
            "micro_batch_size": state.micro_batch_size,
            "train_loss": average if math.isfinite(average) else None,
            "valid_loss": valid_loss if math.isfinite(valid_loss or 0.0) else None,
            "best_valid_loss": self.best["valid_loss"],
            "best_step": self.best["step"],
            "skipped_steps": state.skipped_steps,
        }
        if diverged_at is not None:
            figures[DIVERGED] = diverged_at
        atomic_write(metrics / "curves.csv", self.history.to_csv(), durable)
        write_json(metrics / "train.json", figures, durable)
        atomic_write(metrics / "wall_clock.csv", self.history.to_csv(self.clock), durable)
        return figures

    def write_performance(self, metrics: Path, forecast: Forecast) -> None:
        """Write metrics/performance.json, which no stage declares: clocks do not reproduce."""
        if not self.processes.leads:
            return
        device = self.state.model.head.device
        tokens = self.config.batch_size * self.state.model.config.context_length
        flops = self.state.model.flops_per_token()
        size = self.processes.size
        speed = performance(device, self.config.dtype, self.step_seconds, tokens, flops, size)
        if size > 1:
            by_rank = zip(*self.forward_seconds, strict=True)
            speed["forward_seconds_median_by_rank"] = [
                round(statistics.median(seconds), 6) for seconds in by_rank
            ]
        chosen = {
            "micro_batch_size": self.state.micro_batch_size,
            "compiled": self.config.compile is True,
        }
        write_json(metrics / "performance.json", speed | chosen | forecast.beside_measured(device))


def _slow_rank(forward_seconds: list[list[float]], step_seconds: list[float]) -> str:
    """Which rank holds the others up, of seconds (steps, ranks), in words; nothing if none does."""
    latest = forward_seconds[-WATCHED:]
    if len(latest) < WATCHED or len(latest[0]) == 1:
        return ""
    medians = [statistics.median(of_rank) for of_rank in zip(*latest, strict=True)]
    slowest = max(range(len(medians)), key=medians.__getitem__)
    others_s = statistics.median(medians[:slowest] + medians[slowest + 1 :])
    held_up_s = medians[slowest] - others_s
    if held_up_s < SLOW * max(others_s, statistics.median(step_seconds[-WATCHED:]) / 2):
        return ""
    times = medians[slowest] / others_s
    return f"  rank {slowest} is slow: {times:.1f} times the others' forward pass"


def _copy_as_file(checkpoint: Path, target: Path) -> None:
    """Publish a checkpoint, which several processes have written as a folder."""
    if checkpoint.is_dir():
        as_one_file(checkpoint, target)
    else:
        atomic_copy(checkpoint, target)
    commit(target)


def _report_others(folder: Path, identity: dict[str, Any] | None) -> None:
    """Say how much unfinished runs with other settings, data or code keep on disk.

    With the identity of a run that begins anew, say too why it does not go on with one of them.
    """
    siblings = (path for path in folder.parent.iterdir() if path != folder)
    others = [path for path in siblings if any(path.glob("step-*"))]
    if not others:
        return
    files = (f for path in others for f in path.rglob("*") if f.is_file())
    size = sum(map(_size_bytes, files))
    keep = "keeps" if len(others) == 1 else "keep"
    line = f"{count(len(others), 'other run')} {keep} {size / 1e6:.0f} MB in {folder.parent}"
    if identity is not None and (words := nearest(others, _as_json(identity))):
        line += f"; {'that' if len(others) == 1 else 'the nearest'}, {words}"
    say(line)


def _size_bytes(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # that run has just finished
        return 0


def _best_beside(path: Path) -> Path:
    """The best checkpoint of the run that `path` is of: itself or a file beside it.

    Raises InputError if none has the weights that `path` names: it decides what is published.
    """
    extra = read_run(path)
    step = extra["best"]["step"]
    for best in (
        path,
        path.with_name("best.safetensors"),
        path.with_name(f"step-{step:08d}.safetensors"),
    ):
        if best.is_file():
            theirs = read_run(best)
            same = theirs["weights"].get(str(step)) == extra["weights"][str(step)]
            if theirs["iteration"] == step and same:
                verify(best)
                return best
    raise InputError(
        f"{path}: its best checkpoint, of step {step}, is not beside it; copy it there"
    )


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """The value as it comes back from a checkpoint."""
    return dict(json.loads(json.dumps(value)))


def _difference(part: str, ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    return ", ".join(
        f"{part}.{key} = {theirs.get(key)} there, {ours.get(key)} here"
        for key in sorted(ours.keys() | theirs.keys())
        if theirs.get(key) != ours.get(key)
    )
