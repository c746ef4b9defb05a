"""One training run from its first step to its published files, killable at any point between.

Run(...)  locks .dvc/tmp/lm-resume/RUN_ID/ and restores the newest intact checkpoint: resume.py
log       history, console, metrics to watch during training: logbook.py, pace.py
save      a checkpoint, in the background; a caught signal then ends the process
publish   models and metrics appear; the run folder keeps the last state, because a kill
          before DVC has recorded the outputs would otherwise lose the training: publish.py

Each of several processes has its Run. At each step they exchange what could differ (signals,
faults), so all decide alike. Only rank 0 writes and prints, but each writes its share of a
checkpoint.
"""

import math
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from lm.base.console import Progress, say
from lm.base.errors import Diverged, EnvironmentFault, InputError, Interrupted
from lm.base.files import atomic_write, sha256_file, write_json
from lm.base.run_id import clock_file, run_folder
from lm.base.settings import RuntimeConfig, TrainConfig
from lm.base.signals import CatchSignals
from lm.data.tokenizer import Tokenizer
from lm.plan.timing import Timing
from lm.runs.logbook import Logbook
from lm.runs.pace import Pace
from lm.runs.publish import publish, write_metrics
from lm.runs.resume import continue_from, report_others, require_continuable, resume
from lm.runs.run_folder import RunFolder, kept_checkpoints
from lm.runs.saved_run import Identity, read_saved_run
from lm.train.loop import due
from lm.train.state import Record, TrainState

REFRESH_S = 2.0  # between two refreshes of the metrics to watch


class Run:
    """The life of one training run; a context manager."""

    def __init__(
        self,
        state: TrainState,
        config: TrainConfig,
        runtime: RuntimeConfig,
        made_of: dict[str, Any],
        runs_root: Path,
        resume_from: Path | None = None,
        live: Path | None = None,
    ):
        """Lock the run folder in `runs_root` and bring `state` to where the run was.

        `made_of` (inputs, code, environment), with the settings of model and training, is the
        run's identity. A resumed run keeps its micro-batch size, unless that exceeds the state's.
        With `live` the metrics are refreshed in that folder during training.
        Raises Busy if another process trains this run, InputError if it cannot continue the
        checkpoint `resume_from`.
        """
        self.state, self.config, self.runtime = state, config, runtime
        self.processes, self.live = state.processes, live if state.processes.leads else None
        identity = Identity(asdict(state.model.config), asdict(config), **made_of, resume_from=None)
        if resume_from is not None:
            self.processes.lead(lambda: require_continuable(resume_from, identity, config))
            identity = replace(identity, resume_from=sha256_file(resume_from))
        path = run_folder(runs_root, identity.parts())
        self.folder = RunFolder(path, runtime.keep_checkpoints, self.processes)
        self.logbook, self.pace = Logbook(state, config, identity), Pace()
        self.clock_file = clock_file(runs_root, identity.parts())
        self.refreshed_s = -math.inf
        try:
            resumed = resume(self.logbook, self.folder)
            if self.processes.leads:
                report_others(path, None if resumed else identity)
            if not resumed and resume_from is not None:
                continue_from(resume_from, self.logbook, self.folder)
        except BaseException:
            self.folder.unlock()
            raise
        tokens = config.tokens_per_step(state.model.config)
        self.progress = Progress(state.step, config.max_steps, runtime.log_interval, tokens)
        self.signals = CatchSignals()
        self.agreed_signal: int | None = None  # caught by one process and known to all

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
        self.folder.unlock()
        self.signals.__exit__(kind, error, traceback)
        if isinstance(error, Diverged) and self.processes.leads:
            curves = self._keep_curves()
            last = f"last good checkpoint: {self._last_good()}"
            error.args = (f"{error}; {last}; curves up to there: {curves}",)

    @property
    def finished(self) -> bool:
        """True once the last step is done or validation has stopped improving."""
        return self.logbook.finished

    def pause_due(self, step: int) -> bool:
        """Return whether a save after this step may be due: then do not launch the next one yet."""
        at_interval = due(step, self.runtime.checkpoint_interval)
        return at_interval or self.signals.caught is not None

    def log(self, record: Record) -> None:
        """Record a finished step, with "valid_loss" if it was validated.

        All processes learn here whether one of them has caught a signal or failed to save.
        """
        forward_s, signals, failed = self.processes.gather_numbers(
            [record["forward_s"], self.signals.caught or 0, self.folder.failed]
        ).T
        # a later signal waits for the next step: all must leave at the same one
        self.agreed_signal = int(signals.max()) or None
        elapsed_s = self.progress.elapsed_s()
        self.pace.add(record, forward_s.tolist())
        self.logbook.add(record, elapsed_s)
        remark = self.pace.slow_rank() if due(record["step"], self.runtime.log_interval) else ""
        self.progress.show(record, self.logbook.history.average_loss, remark)
        if "skipped" in record:
            say(f"warning: step {record['step']} skipped: {record['skipped']}")
        if "valid_loss" in record:
            self.logbook.add_validation(record["valid_loss"])
        if failed.any():
            self.folder.wait()
        if self.live is not None and (
            "valid_loss" in record or elapsed_s - self.refreshed_s >= REFRESH_S
        ):
            with suppress(EnvironmentFault):  # no result depends on them
                write_metrics(self.logbook, self.live, durable=False)
            self.refreshed_s = elapsed_s

    @property
    def save_due(self) -> bool:
        """True if this step must be saved: at the interval, a new best, the end, or a signal."""
        step = self.state.step
        at_interval = due(step, self.runtime.checkpoint_interval)
        new_best = self.logbook.best.step == step
        return at_interval or new_best or self.finished or self.agreed_signal is not None

    def save(self) -> None:
        """Start writing a checkpoint; after a signal wait for it and leave."""
        if self.processes.leads:
            self._write_times()
        state = self.state
        self.folder.save(state.model, state.optimizer, state.step, self.logbook.extra())
        if self.agreed_signal is not None:
            self.folder.wait()
            message = f"stopped, saved at step {state.step}; run again to go on"
            raise Interrupted(self.agreed_signal, message)

    def publish(self, tokenizer: Tokenizer, models: Path, metrics: Path) -> None:
        """Write the outputs; see lm.runs.publish.

        It can be repeated: the run folder still holds the state of the last step.
        """
        self.folder.wait()
        if self.processes.leads:  # the others need not wait
            publish(self.logbook, self.folder, tokenizer, models, metrics, self.progress)

    def write_performance(self, metrics: Path, timing: Timing) -> None:
        """Write metrics/performance.json, which no stage declares: clocks do not reproduce."""
        if self.processes.leads:
            predicted = timing.beside_measured(self.state.model.head.device)
            measured = self.pace.measured(self.state, self.config)  # takes memory: after predicting
            write_json(metrics / "performance.json", measured | predicted)

    def _write_times(self) -> None:
        with suppress(EnvironmentFault):  # no result depends on the times
            times = self.logbook.history.to_csv(self.logbook.clock)
            atomic_write(self.clock_file, times, durable=False)

    def _keep_curves(self) -> Path:
        """Write the curves of a run that has diverged; return their path.

        The clock file is always there: DVC deletes the workspace of an experiment that fails.
        """
        self._write_times()
        if self.live is None:
            return self.clock_file
        valid_loss = self.logbook.valid_loss
        by_validation = valid_loss is not None and not math.isfinite(valid_loss)
        step = self.state.step + (0 if by_validation else 1)
        with suppress(EnvironmentFault):
            write_metrics(self.logbook, self.live, diverged_at=step)
        here = self.clock_file.resolve().is_relative_to(Path.cwd())
        return self.live / "curves.csv" if here else self.clock_file

    def _last_good(self) -> str:
        for path, fault in kept_checkpoints(self.folder.path):
            with suppress(InputError):
                if fault is None:
                    return f"step {read_saved_run(path).step}"
        return "no checkpoint yet"
