"""Checkpoints in a folder: written by N processes, read by any number, whole or skipped."""

import pickle
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lm.base.errors import EnvironmentFault, InputError
from lm.machine.processes import ALONE
from lm.machine.sharded_tensors import whole
from lm.runs.checkpoint import load_checkpoint, read_extra, save_checkpoint
from lm.runs.manifest import commit, verify
from lm.runs.run_folder import RunFolder, kept_checkpoints
from lm.runs.sharded_checkpoint import as_one_file
from lm.train.loop import train
from lm.train.state import new_state
from tests.ranks import outcomes, together
from tests.test_checkpoint import Bomb
from tests.test_resume import traced
from tests.test_train import CPU, SPLIT


def at_once(state):
    """Every number of model and optimizer, whole."""
    tensors = {name: whole(t).clone() for name, t in state.model.state_dict().items()}
    for index, entries in state.optimizer.state_dict()["state"].items():
        tensors |= {f"{index}.{name}": whole(t).clone() for name, t in entries.items()}
    return tensors


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def saved(processes, model_config, config, folder):
    """Checkpoints of steps 2 and 3, training going on; returns what the second must hold."""
    state = new_state(model_config, config, CPU, processes)
    run_folder = RunFolder(folder, 2, processes)
    for record in train(state, SPLIT, replace(config, max_steps=5)):
        if record["step"] in (2, 3):
            extra = {"best": {"step": None}, "note": record["step"]}
            run_folder.save(state.model, state.optimizer, state.step, extra)
            expected = at_once(state)
    run_folder.wait()
    run_folder.unlock()
    return expected


def loaded(processes, model_config, config, path):
    """What a state of another seed is after loading, and the step."""
    state = new_state(model_config, replace(config, seed=99), CPU, processes)
    verify(path, processes)
    step = load_checkpoint(path, state.model, state.optimizer)
    return step, at_once(state)


@pytest.fixture
def config(train_config):
    return replace(
        train_config, batch_size=8, micro_batch_size=1, parallel="fsdp", reduction="tree"
    )


@pytest.fixture
def odd_config(model_config):
    """A vocabulary whose rows nobody can share out evenly."""
    return replace(model_config, vocab_size=97)


@pytest.mark.parametrize(
    ("writers", "readers"),
    [
        (("fsdp", 2), ("none", 1)),
        (("fsdp", 1), ("fsdp", 2)),
        (("ddp", 2), ("fsdp", 2)),
        pytest.param(("fsdp", 2), ("ddp", 2), marks=pytest.mark.soak),
        pytest.param(("fsdp", 2), ("fsdp", 1), marks=pytest.mark.soak),
        pytest.param(("fsdp", 1), ("fsdp", 4), marks=pytest.mark.soak),
        pytest.param(("fsdp", 4), ("fsdp", 2), marks=pytest.mark.soak),
        pytest.param(("ddp", 4), ("none", 1), marks=pytest.mark.soak),
    ],
    ids=str,
)
def test_what_some_processes_save_others_load_to_the_byte(
    odd_config, config, tmp_path, writers, readers
):
    config = replace(config, optimizer="muon")  # of each kind of state something
    parallel, size = writers
    given = (odd_config, replace(config, parallel=parallel), tmp_path)
    expected, *others = together(size, saved, *given, parallel=parallel)
    for other in others:
        assert_same(other, expected)
    parallel, size = readers
    path = tmp_path / "step-00000003"
    given = (odd_config, replace(config, parallel=parallel), path)
    for step, tensors in together(size, loaded, *given, parallel=parallel):
        assert step == 3
        assert_same(tensors, expected)
    assert read_extra(path) == {"best": {"step": None}, "note": 3, "iteration": 3}


def test_a_single_file_is_loaded_by_processes_that_share_the_model(odd_config, config, tmp_path):
    state = new_state(odd_config, replace(config, parallel="none"), CPU)
    next(train(state, SPLIT, replace(config, parallel="none")))
    path = tmp_path / "last.safetensors"
    save_checkpoint(state.model, state.optimizer, 1, path)
    commit(path)
    for step, tensors in together(2, loaded, odd_config, config, path, parallel="fsdp"):
        assert step == 1
        assert_same(tensors, at_once(state))


def test_the_file_that_is_published_is_the_same_for_any_number_of_processes(
    odd_config, config, tmp_path
):
    files = []
    for parallel, size in (("none", 1), ("ddp", 1), ("ddp", 2), ("fsdp", 2)):
        folder, given = tmp_path / f"{parallel}{size}", replace(config, parallel=parallel)
        if parallel == "none":
            saved(ALONE, odd_config, given, folder)
            files.append((folder / "step-00000003.safetensors").read_bytes())
        else:
            together(size, saved, odd_config, given, folder, parallel=parallel)
            as_one_file(folder / "step-00000003", folder / "last.safetensors")
            files.append((folder / "last.safetensors").read_bytes())
    assert files == files[:1] * 4


def traced_save(processes, model_config, config, folder):
    """What this rank puts on disk, and what it renames, while all save."""
    state = new_state(model_config, config, CPU, processes)
    run_folder = RunFolder(folder, 2, processes)
    next(train(state, SPLIT, config))
    events = traced(setattr)
    run_folder.save(state.model, state.optimizer, 1, {"best": {"step": None}})
    run_folder.wait()
    run_folder.unlock()
    return events


def test_every_file_is_on_disk_before_the_folder_and_its_manifest_are_renamed(
    model_config, config, tmp_path
):
    first, second = together(2, traced_save, model_config, config, tmp_path, parallel="fsdp")
    # twice: torch syncs before its last bytes have left its buffer
    assert second.count(("sync", "shard-00002-model-00001-of-00001.safetensors")) == 2
    assert not [name for kind, name in second if kind == "rename"]
    at = first.index(("rename", "step-00000001"))
    assert ("sync", "header.json.tmp") in first[:at]
    assert first[:at].count(("sync", "shard-00001-model-00001-of-00001.safetensors")) == 2
    assert first[at - 1] == ("sync", "step-00000001.tmp")
    assert first[at + 1 :] == [
        ("sync", tmp_path.name),
        ("sync", "step-00000001.json.tmp"),
        ("rename", "step-00000001.json"),
        ("sync", tmp_path.name),
    ]


def sound(processes, folder):
    """The checkpoints, newest first, with what is wrong, as all of the processes see them."""
    return [(path.name, fault) for path, fault in kept_checkpoints(folder, processes)]


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[-9] ^= 4  # in the tensors of that rank
    file.write_bytes(data)


def cut(file):
    file.write_bytes(file.read_bytes()[:-20])


def copy_beside(file):
    shutil.copy(file, file.with_name("more"))


DAMAGES = {
    "a flipped bit": ("shard-00002", flip_a_bit, "content differs from the hash in its manifest"),
    "a missing file": ("shard-00002", Path.unlink, "missing, or not in the manifest"),
    "a short file": ("shard-00001", cut, "its manifest says"),
    "a file too many": ("shard-00001", copy_beside, "more: missing, or not in the manifest"),
    "a torn manifest": ("manifest", cut, "step-00000003.json"),
    "another manifest": ("manifest", lambda file: file.write_text("[]"), "not the manifest of a"),
    "a missing manifest": ("manifest", Path.unlink, "no manifest step-00000003.json"),
}  # fmt: skip


def test_a_damaged_checkpoint_is_named_by_all_and_the_one_before_is_whole(
    model_config, config, tmp_path
):
    together(2, saved, model_config, config, tmp_path / "whole", parallel="fsdp")
    for number, (place, damage, said) in enumerate(DAMAGES.values()):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        newest = folder / "step-00000003"
        (file,) = (
            [newest.with_suffix(".json")]
            if place == "manifest"
            else newest.glob(f"{place}-*.safetensors")
        )
        damage(file)
        if damage in (Path.unlink, cut) and place != "manifest":  # seen without the hash, too
            state = new_state(model_config, replace(config, parallel="none"), CPU)
            with pytest.raises(InputError, match="step-00000003"):
                load_checkpoint(newest, state.model, state.optimizer)
        first, second = together(2, sound, folder, parallel="fsdp")
        assert first == second
        (name, fault), before = first
        assert name == "step-00000003"
        assert said in fault
        assert before == ("step-00000002", None)


@pytest.mark.parametrize("place", ["header.json", "shard-00001", ".metadata"])
def test_a_pickle_in_place_of_a_file_is_refused_and_not_run(
    model_config, config, tmp_path, monkeypatch, place
):
    """`.metadata` is what torch.distributed.checkpoint unpickles in its own format."""
    monkeypatch.chdir(tmp_path)
    together(2, saved, model_config, config, tmp_path, parallel="fsdp")
    folder = tmp_path / "step-00000003"
    for file in [*folder.glob(f"{place}*")] or [folder / place]:
        file.write_bytes(pickle.dumps(Bomb()))
    state = new_state(model_config, replace(config, parallel="none"), CPU)
    with pytest.raises(InputError, match="step-00000003"):
        verify(folder)
    if place == ".metadata":  # nobody reads it
        assert load_checkpoint(folder, state.model, state.optimizer) == 3
    else:
        with pytest.raises(InputError, match="step-00000003"):
            load_checkpoint(folder, state.model, state.optimizer)
    assert not (tmp_path / "bombed").exists()


def full(processes, model_config, config, folder, rank):
    """The second save does not fit on the disk of one rank: a limit on a file's size stands in."""
    state = new_state(model_config, config, CPU, processes)
    run_folder = RunFolder(folder, 2, processes)
    extra = {"best": {"step": None}}
    next(train(state, SPLIT, config))
    run_folder.save(state.model, state.optimizer, 1, extra)
    run_folder.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if processes.rank == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    run_folder.save(state.model, state.optimizer, 2, extra)
    run_folder.wait()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_rank_stops_all_and_loses_nothing(model_config, config, tmp_path, rank):
    told, left = outcomes(2, full, model_config, config, tmp_path, rank, parallel="fsdp")
    assert isinstance(told, EnvironmentFault)
    assert str(told).startswith(f"rank {rank}: {tmp_path / 'step-00000002.tmp'}: File too large (")
    assert " MB are free in " in str(told)
    assert isinstance(left, SystemExit)
    assert left.code == EnvironmentFault.exit_code
    assert sound(ALONE, tmp_path) == [("step-00000001", None)]
    RunFolder(tmp_path, 2).unlock()  # clears what was left half written
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "lock", "step-00000001", "step-00000001.json",
    ]  # fmt: skip
