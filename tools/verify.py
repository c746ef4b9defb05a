"""Check that the results match dvc.lock and each other: `python -m tools.verify`.

DVC trusts size and modification time: `dvc status` misses a byte that flipped on disk, and
`dvc checkout` copies it from a damaged cache. This tool hashes every byte again, in workspace and
cache. It compares tokens, tokenizer, model and checkpoints with each other and with the model's
provenance. With --replay N it also trains N steps again and compares the weights.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dvc.fs import localfs
from dvc.repo import Repo
from dvc_data.hashfile.build import build
from dvc_data.hashfile.db import HashFileDB
from safetensors import SafetensorError
from safetensors.torch import load_file

from lm.base.console import count, say
from lm.base.errors import EnvironmentFault, InputError, one_line_errors
from lm.base.files import sha256_file
from lm.base.paths import BEST, LAST, MODEL, PRETRAINED, TOKENIZER, TOKENS
from lm.base.sections import brief, read_section
from lm.base.settings import DEVICE, TrainConfig
from lm.data.splits import open_tokens
from lm.data.tokenizer import load_tokenizer
from lm.machine.device import choose_device, environment, make_deterministic
from lm.machine.processes import joined
from lm.model.huggingface import start_from
from lm.model.model_folder import load_model, read_provenance
from lm.model.stored import require_finite, require_settings
from lm.model.transformer import ModelConfig, TransformerLM
from lm.runs.checkpoint import load_checkpoint, stored_weights, weights_sha256
from lm.runs.manifest import verify
from lm.runs.run_folder import kept_checkpoints
from lm.runs.saved_run import SavedIdentity, SavedRun, read_saved_run
from lm.train.loop import train
from lm.train.state import TrainState, new_state
from stages.run import RUNS_ROOT
from tools.lock import LOCK, recorded_hashes, stages_of
from tools.repository import opened


def recorded_faults(repo: Repo) -> Iterator[str]:
    """Yield the files in workspace and cache that differ from the hashes that DVC recorded."""
    recorded = recorded_hashes()
    for name in stages_of(Path("dvc.yaml")).keys() - {name.partition("@")[0] for name in recorded}:
        yield f"stage {name}: not in {LOCK}; `dvc repro` runs it"
    outputs = {path: md5 for kinds in recorded.values() for path, md5 in kinds["outs"].items()}
    for path, md5 in outputs.items():
        yield from _output_faults(Path(path), md5, repo)
    read = {path: md5 for kinds in recorded.values() for path, md5 in kinds["deps"].items()}
    for path, md5 in read.items():
        if path not in outputs and Path(path).exists() and _hash(Path(path), repo) != md5:
            yield f"{path}: differs from what the stages read; `dvc repro` runs them again"


def _output_faults(path: Path, md5: str, repo: Repo) -> Iterator[str]:
    restore = f"`dvc checkout --force {path}` restores {path} from the cache"
    instead = f"delete it, then {restore}"  # DVC would only compare size and time
    files = {path: md5}
    listing = _cached(md5, repo)
    if md5.endswith(".dir") and listing.is_file() and not any(_cache_faults(md5, repo)):
        files = {path / item["relpath"]: item["md5"] for item in json.loads(listing.read_bytes())}
        for file in sorted(set(filter(Path.is_file, path.rglob("*"))) - files.keys()):
            yield f"{file}: not among the recorded files; {restore}"
    elif path.is_dir():  # its list is damaged or missing: check what the workspace has
        for file in sorted(filter(Path.is_file, path.rglob("*"))):
            yield from _cache_faults(_hash(file, repo), repo)
    for file, expected in files.items():
        if not file.exists():
            yield f"{file}: missing; {restore}"
        elif (found := _hash(file, repo)) != expected:
            yield f"{file}: md5 is {found}, dvc.lock says {expected}; {instead}"
        yield from _cache_faults(expected, repo)


def _cache_faults(md5: str, repo: Repo) -> Iterator[str]:
    file = _cached(md5, repo)
    if file.is_file() and (found := _hash(file, repo)) != md5.removesuffix(".dir"):
        yield (
            f"{file}: md5 is {found}, its name says another: the cache is damaged; delete this "
            "file; if the workspace is right, run `dvc commit --force`, else delete the output, "
            "too, and run `dvc pull` or `dvc repro --force`"
        )


def _cached(md5: str, repo: Repo) -> Path:
    return Path(repo.cache.local.oid_to_path(md5))


def _hash(path: Path, repo: Repo) -> str:
    """Read every byte of a file or folder again; return the hash that DVC gives it."""
    forgetful = HashFileDB(localfs, repo.cache.local.path)  # without DVC's table of sizes and times
    place, ignore = str(path.absolute()), repo.dvcignore
    _, _, found = build(forgetful, place, localfs, "md5", dry_run=True, ignore=ignore)
    return str(found.hash_info.value)


def belonging_faults() -> Iterator[str]:
    """Yield the files that do not fit: tokens, tokenizer, model, or what provenance names."""
    ours, theirs = MODEL / "tokenizer.json", TOKENIZER / "tokenizer.json"
    yield from _raised(lambda: open_tokens(TOKENS, sha256_file(theirs), load_tokenizer(TOKENIZER)))
    yield from _raised(lambda: load_model(MODEL, torch.device("cpu")))
    if sha256_file(ours) != sha256_file(theirs):
        yield f"{ours}: differs from {theirs}"
    provenance = read_provenance(MODEL)
    for name, sha256 in {**provenance["inputs"], **provenance["code"]}.items():
        if not Path(name).is_file() or sha256_file(Path(name)) != sha256:
            yield f"{name}: changed since it made the model; `dvc repro` makes the model again"


def checkpoint_faults() -> Iterator[str]:
    """Yield the published checkpoints that are damaged or not of the model's training."""
    for path in (LAST, BEST):
        verify(path)
    last, best = read_saved_run(LAST), read_saved_run(BEST)
    if last.identity.parts() != read_provenance(MODEL):
        yield f"{LAST}: belongs to another run than {MODEL / 'provenance.json'}"
    step = last.best.step
    weights, named = best.weights.get(str(step)), last.weights.get(str(step))
    if best.step != step or weights != named:
        yield f"{BEST}: is not the best checkpoint that {LAST} names"
    source = LAST if last.identity.train.get("early_stopping") is None else BEST
    tensors, published = load_file(source), load_file(MODEL / "model.safetensors")
    for file, found in ((source, tensors), (MODEL / "model.safetensors", published)):
        yield from _raised(partial(require_finite, str(file), found, found))
    expected = {f"model.{name}" for name in published}
    if expected != {name for name in tensors if name.startswith("model.")} or not all(
        torch.equal(tensor, tensors[f"model.{name}"]) for name, tensor in published.items()
    ):
        yield f"{MODEL / 'model.safetensors'}: its weights differ from those in {source}"


def unfinished_faults(runs_root: Path) -> Iterator[str]:
    """Yield the checkpoints of unfinished runs that are damaged.

    A file without a manifest is no checkpoint: a kill leaves such files, and a save in progress.
    """
    for folder in sorted(filter(Path.is_dir, runs_root.glob("*"))):
        for path, fault in kept_checkpoints(folder):
            if fault is not None and path.with_suffix(".json").exists():
                yield f"{fault}; the run will resume from an earlier checkpoint"


def _raised(action: Callable[[], object]) -> Iterator[str]:
    try:
        action()
    except (InputError, OSError) as error:
        yield str(error)


def _complete(faults: Iterator[str]) -> list[str]:
    """Return each fault once, and last the error that stopped the check, if one did."""
    found: list[str] = []
    try:
        found.extend(faults)
    except (InputError, OSError, SafetensorError) as error:
        found.append(str(error))
    return list(dict.fromkeys(found))  # one object of the cache can serve many files


def replay(steps: int, device: torch.device) -> str:
    """Train `steps` steps again and compare the weights with the recorded ones, bit for bit.

    Start from the best checkpoint if that many steps followed it, else from the untrained model.
    Return a sentence with the steps that agree. Raises InputError if the weights differ or cannot
    be compared, EnvironmentFault if this environment gives other bits than the training's.
    """
    verify(LAST)
    recorded = read_saved_run(LAST)
    identity = recorded.identity
    config = read_section(TrainConfig, identity.parts(), "train", str(LAST))
    model_config = read_section(ModelConfig, identity.parts(), "model", str(LAST))
    make_deterministic(device, config.threads)
    _require_same_bits(identity, environment(device, config.compile))
    require_settings(str(LAST), model_config, stored_weights(LAST))

    def initialise(model: TransformerLM) -> None:
        if config.init_from is not None:
            start_from(PRETRAINED / config.init_from, model, load_tokenizer(TOKENIZER))

    known = {int(step): sha256 for step, sha256 in recorded.weights.items()}
    sizes = {int(step): size for step, size in identity.micro_batch_sizes.items()}
    with joined(config.parallel, device, timeout_s=60) as processes:  # only this one
        state = new_state(model_config, config, device, processes, initialise)
        start = _restore_start(state, steps, recorded)
        compared = [step for step in sorted(known) if start < step <= start + steps]
        if not compared:
            following = min((step for step in known if step > start), default=None)
            if following is None:
                raise InputError(f"--replay: no weights are recorded after step {start}")
            raise InputError(
                f"--replay {steps}: it starts at step {start}, and the next recorded weights are "
                f"of step {following}; use --replay {following - start}"
            )
        state.micro_batch_size = size_at(sizes, start + 1)
        for _ in train(state, open_tokens(TOKENS).train, config):
            if state.step in known and weights_sha256(state.model) != known[state.step]:
                raise InputError(f"replay from step {start}: weights differ at step {state.step}")
            if state.step == start + steps:
                break
            state.micro_batch_size = size_at(sizes, state.step + 1)
    shown = ", ".join(f"step {step}" for step in compared)
    last = state.step
    return f"replayed steps {start + 1} to {last}: the weights at {shown} are the same, bit for bit"


def _require_same_bits(identity: SavedIdentity, here: dict[str, Any]) -> None:
    """Raise EnvironmentFault or InputError unless a replay here must give the same bits."""
    there = identity.environment

    def words(values: dict[str, Any]) -> str:
        names = sorted(k for k in here.keys() | there if here.get(k) != there.get(k))
        return ", ".join(f"{name} is {values.get(name)}" for name in names)

    if here != there:
        raise EnvironmentFault(
            f"{LAST}: trained where {words(there)}; here {words(here)}, which gives other bits"
        )
    if any(size > 1 for size in (identity.num_processes or {}).values()):
        raise InputError(
            f"{LAST}: several processes summed their gradients in no fixed order, so one process "
            "cannot replay them; it can if they trained with train.reduction: tree"
        )


def _restore_start(state: TrainState, steps: int, recorded: SavedRun) -> int:
    """Bring `state` to the newest point at least `steps` steps before the end; return its step."""
    verify(BEST)
    best, last_step = read_saved_run(BEST), recorded.step
    if best.step + steps <= last_step and best.identity == recorded.identity:
        state.step = load_checkpoint(BEST, state.model, state.optimizer)
        if best.scaler is not None:
            state.scaler.load_state_dict(asdict(best.scaler))
    elif recorded.identity.resume_from is not None:
        raise InputError(f"{LAST}: continues another run, whose start is not kept: no replay")
    elif steps > last_step:
        raise InputError(
            f"--replay {steps}: the run had {count(last_step, 'step')}; use at most {last_step}"
        )
    return state.step


def size_at(sizes: dict[int, int], step: int) -> int:
    """Return the micro-batch size of a step, given the first step of each size."""
    return sizes[max(first for first in sizes if first <= step)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.verify", description=__doc__)
    parser.add_argument("--replay", type=int, metavar="N", help="train N steps again and compare")
    parser.add_argument("--device", default="auto", help=DEVICE.text)
    options = parser.parse_args(arguments)
    with one_line_errors():
        if not DEVICE.holds(options.device):
            raise InputError(f"--device {brief(options.device)}: {DEVICE.text}")
        if options.replay is not None and options.replay < 1:
            raise InputError("--replay: must be >= 1")
        if not LOCK.is_file():
            raise InputError(f"{LOCK}: no such file; run `make repro` in the project's root folder")
        with opened() as repo:
            checks = {
                "every output and dependency is as dvc.lock says": recorded_faults(repo),
                "tokens, tokenizer, model and provenance belong together": belonging_faults(),
                "the published checkpoints are whole and of this model": checkpoint_faults(),
                "the checkpoints of unfinished runs are whole": unfinished_faults(RUNS_ROOT),
            }
            number = 0
            for claim, faults in checks.items():
                found = _complete(faults)
                say("\n".join([f"fault: {fault}" for fault in found] or [f"ok: {claim}"]))
                number += len(found)
        if number:
            raise InputError(f"{count(number, 'fault')} found")
        if options.replay is not None:
            say(f"ok: {replay(options.replay, choose_device(options.device))}")


if __name__ == "__main__":
    main()
