"""Where a run begins: at its own newest checkpoint, at another run's, or at the first step."""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lm.base.console import changes, count, say
from lm.base.errors import InputError
from lm.base.files import atomic_copy, require_file
from lm.base.runs import MICRO_BATCH_SIZES, NUM_PROCESSES, clock_file, decided
from lm.base.settings import TrainConfig
from lm.runs.checkpoint import Extra, load_checkpoint
from lm.runs.history import Clock
from lm.runs.logbook import Logbook
from lm.runs.manifest import commit, verify
from lm.runs.resume_directory import ResumeDirectory, kept_checkpoints, newest_first
from lm.runs.saved_run import Identity, read_run

MOST_TOLD = 4  # differences of two runs in a line


def resume(logbook: Logbook, directory: ResumeDirectory) -> bool:
    """Restore the newest intact checkpoint of this very run; return whether there is one."""
    state = logbook.state
    for path, fault in kept_checkpoints(directory.folder, state.processes):
        try:
            fault = fault or _fault(logbook, directory, path)
            theirs = {} if fault else _restore(logbook, directory, path)["identity"]
        except InputError as error:
            fault = str(error)
        if fault is not None:
            say(f"warning: {fault}; passed over")
            continue
        _keep_micro_batch_size(logbook, theirs[MICRO_BATCH_SIZES])
        if NUM_PROCESSES in theirs:
            logbook.changes[NUM_PROCESSES] = dict(theirs[NUM_PROCESSES])
        finished = f"; it is finished: delete {path.parent} to train anew"
        say(f"Resumed at step {state.step}{finished if logbook.finished else ''}")
        return True
    return False


def _fault(logbook: Logbook, directory: ResumeDirectory, path: Path) -> str | None:
    """Return why an undamaged checkpoint must not be resumed, or None."""
    extra = read_run(path)
    ours, theirs = _as_json(logbook.identity.parts()), decided(extra["identity"])
    if ours != theirs:
        return f"{path}: of another run: {_few(_differences(theirs, ours))}"
    step, processes = extra["iteration"], logbook.state.processes
    if path.stem != directory.path(step).stem or step > logbook.config.max_steps:
        return f"{path}: is at step {step}: not that of its name, or beyond train.max_steps"
    if extra["best"]["step"] is not None:
        try:
            best = directory.path(extra["best"]["step"])
            processes.together(lambda: verify(best, processes))
        except InputError as error:
            return str(error)
    return None


def _restore(logbook: Logbook, directory: ResumeDirectory, path: Path) -> Extra:
    """Bring everything to where a checkpoint was; return what was saved beside the state."""
    extra, state = read_run(path), logbook.state
    state.step = load_checkpoint(path, state.model, state.optimizer, state.processes)
    logbook.restore(extra)
    times = clock_file(directory.folder.parent, extra["identity"])
    text = times.read_bytes() if times.is_file() else b""
    logbook.clock = Clock.from_csv(text, resumed_at=state.step)
    return extra


def _keep_micro_batch_size(logbook: Logbook, sizes: dict[str, int]) -> None:
    """Go on with the micro-batch size that the run had, or with what fits if that is less."""
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
    """Raise InputError unless a checkpoint is a file, whole, of the same model and data."""
    require_file(path)
    verify(path)
    extra = read_run(path)
    for part, ours in (("model", identity.model), ("inputs", identity.inputs)):
        theirs = extra["identity"].get(part, {})
        if ours != theirs:
            raise InputError(f"{path}: made with another {_difference(part, ours, theirs)}")
    if extra["best"]["step"] is not None:
        _best_beside(path)
    if extra["iteration"] >= config.max_steps:
        raise InputError(
            f"{path}: is at step {extra['iteration']}, train.max_steps = "
            f"{config.max_steps}; nothing is left to do, raise train.max_steps"
        )


def continue_from(path: Path, logbook: Logbook, directory: ResumeDirectory) -> None:
    """Start from another run's checkpoint, with the settings of this one."""
    state = logbook.state
    settings = [
        {key: value for key, value in group.items() if key != "params"}
        for group in state.optimizer.param_groups
    ]
    _restore(logbook, directory, path)
    for group, ours in zip(state.optimizer.param_groups, settings, strict=True):
        group.update(ours)
    logbook.best["misses"] = 0
    if (step := logbook.best["step"]) is not None:
        state.processes.lead(lambda: _adopt(_best_beside(path), directory.folder, step))
    logbook.begin_changes()
    say(f"Continuing {path} from step {state.step}")


def _adopt(best: Path, folder: Path, step: int) -> None:
    """Keep another run's best checkpoint, a file, as one of this run's."""
    file = folder / f"step-{step:08d}.safetensors"
    atomic_copy(best, file)
    commit(file)


def _best_beside(path: Path) -> Path:
    """Return the best checkpoint of the run that `path` is of: itself or a file beside it.

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


def report_others(folder: Path, begins_anew: Identity | None) -> None:
    """Say how much unfinished runs with other settings, data or code keep on disk.

    If this run begins anew, say too why it does not go on with one of them.
    """
    siblings = (path for path in folder.parent.iterdir() if path != folder)
    others = [path for path in siblings if any(path.glob("step-*"))]
    if not others:
        return
    files = (f for path in others for f in path.rglob("*") if f.is_file())
    size = sum(map(_size_bytes, files))
    keep = "keeps" if len(others) == 1 else "keep"
    line = f"{count(len(others), 'other run')} {keep} {size / 1e6:.0f} MB in {folder.parent}"
    if begins_anew is not None and (words := _nearest(others, _as_json(begins_anew.parts()))):
        line += f"; {'that' if len(others) == 1 else 'the nearest'}, {words}"
    say(line)


def _nearest(folders: Iterable[Path], identity: dict[str, Any]) -> str:
    """Say which of the runs in some folders is most like `identity`, and why it is another.

    Return nothing if no checkpoint of theirs can be read.
    """
    found = []
    for path in (path for folder in folders for path in newest_first(folder)[:1]):
        with suppress(InputError, OSError):  # its trainer may drop it meanwhile
            extra, written = read_run(path), path.stat().st_mtime
            why = _differences(decided(extra["identity"]), identity)
            found.append((len(why), -written, extra["iteration"], _few(why)))
    if not found:
        return ""
    _, _, step, words = min(found)
    return f"at step {step}, is not resumed because of {words}"


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return what tells two identities apart, in words such as "train.lr 0.001 -> 0.003"."""
    found = []
    for part in dict.fromkeys(("model", "train", *sorted({**before, **now}))):
        of_before, of_now = before.get(part), now.get(part)
        if part in ("inputs", "code"):  # hashes by file
            found += list(changes(of_before or {}, of_now or {}))
        elif isinstance(of_before, dict) and isinstance(of_now, dict):
            found += [f"{part}.{name} {how}" for name, how in changes(of_before, of_now).items()]
        elif of_before != of_now:
            found.append(part)
    return found


def _few(words: list[str]) -> str:
    """Join the first few into a line, with the number of the others."""
    more = len(words) - MOST_TOLD
    return ", ".join(words[:MOST_TOLD]) + f" and {more} more" * (more > 0)


def _size_bytes(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # that run has just finished
        return 0


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """Return the value as it comes back from a checkpoint."""
    return dict(json.loads(json.dumps(value)))


def _difference(part: str, ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    return ", ".join(
        f"{part}.{key} = {theirs.get(key)} there, {ours.get(key)} here"
        for key in sorted(ours.keys() | theirs.keys())
        if theirs.get(key) != ours.get(key)
    )
