"""Choose where a run begins: at its newest checkpoint, at another run's, or at the first step."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm.base.console import count, differences, few, say
from lm.base.errors import InputError
from lm.base.files import atomic_copy, require_file
from lm.base.run_id import MICRO_BATCH_SIZES, NUM_PROCESSES, clock_file, fixed_parts
from lm.base.settings import TrainConfig
from lm.runs.checkpoint import load_checkpoint
from lm.runs.history import Clock
from lm.runs.logbook import Logbook
from lm.runs.manifest import commit, verify
from lm.runs.run_folder import RunFolder, kept_checkpoints, newest_first
from lm.runs.saved_run import Identity, SavedRun, read_saved_run

MOST_NAMED = 4  # differences of two runs that a line names


def resume(logbook: Logbook, folder: RunFolder) -> bool:
    """Restore the newest intact checkpoint of this very run; return whether there is one."""
    state = logbook.state
    for path, fault in kept_checkpoints(folder.path, state.processes):
        try:
            if fault is not None:
                raise InputError(fault)
            saved = read_saved_run(path)
            _require_own(logbook, folder, path, saved)
            _restore(logbook, folder, path, saved)
        except InputError as error:
            say(f"warning: {error}; skipped")
            continue
        _keep_micro_batch_size(logbook, saved.identity.micro_batch_sizes)
        if saved.identity.num_processes is not None:
            logbook.changes[NUM_PROCESSES] = dict(saved.identity.num_processes)
        finished = f"; it is finished: delete {path.parent} to train anew"
        say(f"Resumed at step {state.step}{finished if logbook.finished else ''}")
        return True
    return False


def _require_own(logbook: Logbook, folder: RunFolder, path: Path, saved: SavedRun) -> None:
    """Raise InputError unless a checkpoint is of this run, and its best checkpoint is intact."""
    theirs, ours = fixed_parts(saved.identity.parts()), logbook.identity.parts()
    if theirs != ours:
        raise InputError(f"{path}: of another run: {few(_disagreements(theirs, ours), MOST_NAMED)}")
    step, best_step = saved.step, saved.best.step
    if path.stem != folder.checkpoint(step).stem or step > logbook.config.max_steps:
        raise InputError(
            f"{path}: is at step {step}: not the step in its name, or above train.max_steps"
        )
    if best_step is not None:
        best, processes = folder.checkpoint(best_step), logbook.state.processes
        processes.together(lambda: verify(best, processes))


def _restore(logbook: Logbook, folder: RunFolder, path: Path, saved: SavedRun) -> None:
    """Restore state, logbook and clock from a checkpoint; `saved` is the record in it."""
    state = logbook.state
    state.step = load_checkpoint(path, state.model, state.optimizer, state.processes)
    logbook.restore(saved)
    times = clock_file(folder.path.parent, saved.identity.parts())
    text = times.read_bytes() if times.is_file() else b""
    logbook.clock = Clock.from_csv(text, resumed_at=state.step)


def _keep_micro_batch_size(logbook: Logbook, sizes: dict[str, int]) -> None:
    """Keep the micro-batch size that the run had, or lower it to one that fits."""
    state = logbook.state
    before, fitting = sizes[max(sizes, key=int)], state.micro_batch_size
    share = logbook.config.batch_size // state.processes.size  # another number may not divide it
    fitting = max(n for n in range(1, min(before, fitting) + 1) if share % n == 0)
    logbook.changes[MICRO_BATCH_SIZES] = dict(sizes)
    state.micro_batch_size = before
    if fitting < before and not logbook.finished:
        state.micro_batch_size = fitting
        why = (
            f"Micro-batches of {count(before, 'window')} no longer fit"
            if share % before == 0
            else f"This process's {count(share, 'window')} cannot be split into micro-batches of "
            f"{before}"
        )
        say(f"{why}; using {fitting} from now on")
        logbook.add_change(MICRO_BATCH_SIZES, fitting, state.step + 1)


def require_continuable(path: Path, identity: Identity, config: TrainConfig) -> None:
    """Raise InputError unless a checkpoint is an intact file of the same model and data."""
    require_file(path)
    verify(path)
    saved = read_saved_run(path)
    for part in ("model", "inputs"):
        ours, theirs = getattr(identity, part), getattr(saved.identity, part)
        keys = sorted(key for key in {**ours, **theirs} if theirs.get(key) != ours.get(key))
        if keys:
            found = (f"{part}.{k} = {theirs.get(k)} there, {ours.get(k)} here" for k in keys)
            raise InputError(f"{path}: made with another {', '.join(found)}")
    if saved.best.step is not None:
        _best_beside(path, saved)
    if saved.step >= config.max_steps:
        raise InputError(
            f"{path}: is at step {saved.step}, train.max_steps = "
            f"{config.max_steps}; nothing is left to do, raise train.max_steps"
        )


def continue_from(path: Path, logbook: Logbook, folder: RunFolder) -> None:
    """Start from another run's checkpoint, with the settings of this one."""
    state, saved = logbook.state, read_saved_run(path)
    groups = state.optimizer.param_groups
    settings = [{k: value for k, value in group.items() if k != "params"} for group in groups]
    _restore(logbook, folder, path, saved)
    for group, ours in zip(state.optimizer.param_groups, settings, strict=True):
        group.update(ours)
    logbook.best = replace(logbook.best, misses=0)
    if (step := logbook.best.step) is not None:
        kept = folder.path / f"step-{step:08d}.safetensors"

        def adopt_best() -> None:
            atomic_copy(_best_beside(path, saved), kept)
            commit(kept)

        state.processes.lead(adopt_best)
    logbook.begin_changes()
    say(f"Continuing {path} from step {state.step}")


def _best_beside(path: Path, saved: SavedRun) -> Path:
    """Return the best checkpoint of the run that saved `path`: itself or a file beside it.

    Raises InputError if none has the weights that `path` records: they may be published.
    """
    step = saved.best.step
    names = (path.name, "best.safetensors", f"step-{step:08d}.safetensors")
    for best in map(path.with_name, names):
        if best.is_file():
            theirs = read_saved_run(best)
            same = theirs.weights.get(str(step)) == saved.weights[str(step)]
            if theirs.step == step and same:
                verify(best)
                return best
    raise InputError(
        f"{path}: its best checkpoint, of step {step}, is not beside it; copy it there"
    )


def report_others(own: Path, begins_anew: Identity | None) -> None:
    """Print how much disk space unfinished runs with other settings, data or code take.

    If this run begins anew, print why it does not go on with the most similar of them.
    """
    others = [f for f in own.parent.iterdir() if f != own and any(f.glob("step-*"))]
    if not others:
        return
    size, found = 0, []
    for other in others:
        with suppress(InputError, OSError, IndexError):  # its process may delete files meanwhile
            for file in other.rglob("*"):
                with suppress(OSError):
                    size += file.stat().st_size if file.is_file() else 0
            if begins_anew is not None:
                path = newest_first(other)[0]
                saved, written = read_saved_run(path), path.stat().st_mtime
                why = _disagreements(fixed_parts(saved.identity.parts()), begins_anew.parts())
                found.append((len(why), -written, saved.step, few(why, MOST_NAMED)))
    keep, which = ("keeps", "that") if len(others) == 1 else ("keep", "the nearest")
    line = f"{count(len(others), 'other run')} {keep} {size / 1e6:.0f} MB in {own.parent}"
    if found:
        _, _, step, words = min(found)
        line += f"; {which}, at step {step}, is not resumed because of {words}"
    say(line)


def _disagreements(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return how two identities differ, in words such as "train.lr 0.001 -> 0.003"."""
    found = []
    for part in dict.fromkeys(("model", "train", *sorted({**before, **now}))):
        of_before, of_now = before.get(part), now.get(part)
        if part in ("inputs", "code"):  # hashes by file
            found += list(differences(of_before or {}, of_now or {}))
        elif isinstance(of_before, dict) and isinstance(of_now, dict):
            differing = differences(of_before, of_now)
            found += [f"{part}.{name} {how}" for name, how in differing.items()]
        elif of_before != of_now:
            found.append(part)
    return found
