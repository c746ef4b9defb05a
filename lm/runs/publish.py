"""Write the outputs of a run from its checkpoints; after a kill this can be repeated."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lm.base.console import Progress, duration, say
from lm.base.files import atomic_copy, atomic_write, write_json
from lm.base.tables import ended_worse
from lm.data.tokenizer import Tokenizer
from lm.model.model_folder import save_model
from lm.model.transformer import TransformerLM
from lm.runs.checkpoint import load_checkpoint
from lm.runs.logbook import Logbook
from lm.runs.manifest import commit, verify
from lm.runs.run_folder import RunFolder
from lm.runs.sharded_checkpoint import as_one_file


def publish(
    logbook: Logbook,
    folder: RunFolder,
    tokenizer: Tokenizer,
    models: Path,
    metrics: Path,
    progress: Progress,
) -> None:
    """Write models/model, models/checkpoints and the metrics, only one run at a time.

    models/model holds the last weights, or with early stopping the best.
    """
    state, checkpoints = logbook.state, models / "checkpoints"
    best_step, early_stopping = logbook.best.step, logbook.config.early_stopping is not None
    assert best_step is not None  # the last step is always validated
    last, best = folder.checkpoint(state.step), folder.checkpoint(best_step)
    with publishing(folder.path.parent):
        verify(best)
        verify(last)
        _copy_as_file(best, checkpoints / "best.safetensors")
        write_metrics(logbook, metrics)
        model = TransformerLM(state.model.config)  # with fsdp state.model is only a share of it
        load_checkpoint(best if early_stopping else last, model)
        save_model(model, tokenizer, models / "model")
        write_json(models / "model" / "provenance.json", logbook.provenance())
        # last of all: a run that continues this very file still finds it after a kill
        _copy_as_file(last, checkpoints / "last.safetensors")
        say(
            f"Final loss {logbook.history.average_loss:.4f}, validation {logbook.valid_loss:.4f}, "
            f"in {duration(progress.elapsed_s())}; model in {models / 'model'}, "
            f"checkpoints in {checkpoints}, curves in {metrics / 'curves.csv'}"
        )
        if worse := ended_worse(logbook.figures(), early_stopping):
            say(f"warning: {worse}")


@contextmanager
def publishing(runs_root: Path) -> Iterator[None]:
    """Let only one run at a time write the outputs, which all runs of a workspace share."""
    with open(runs_root.with_name("lm-publish.lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_metrics(
    logbook: Logbook, metrics: Path, durable: bool = True, diverged_at: int | None = None
) -> None:
    """Write the curves, the last step's figures, and the times, which no stage declares."""
    atomic_write(metrics / "curves.csv", logbook.history.to_csv(), durable)
    write_json(metrics / "train.json", logbook.figures(diverged_at), durable)
    atomic_write(metrics / "wall_clock.csv", logbook.history.to_csv(logbook.clock), durable)


def _copy_as_file(checkpoint: Path, target: Path) -> None:
    """Copy a checkpoint to one file, even if several processes have written it as a folder."""
    if checkpoint.is_dir():
        as_one_file(checkpoint, target)
    else:
        atomic_copy(checkpoint, target)
    commit(target)
