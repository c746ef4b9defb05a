"""The run folder: written behind training's back, whole or absent, by one at a time."""

import os
import resource
import threading
import time
from pathlib import Path

import pytest
import torch

from lm.base.errors import Busy, EnvironmentFault, InputError
from lm.base.run_id import remove_finished
from lm.runs.checkpoint import load_checkpoint, save_checkpoint
from lm.runs.manifest import verify
from lm.runs.run_folder import RunFolder, kept_checkpoints
from lm.train.optim import OPTIMIZERS
from tests.test_checkpoint import assert_same, trained


def extra(best=None):
    return {"best": {"step": best}}


@pytest.fixture
def trainee(model_config, train_config):
    return trained(model_config, train_config)


def steps(folder):
    return [int(path.stem[5:]) for path in sorted(folder.glob("step-*.safetensors"))]


def test_the_newest_are_kept_and_damage_is_named(trainee, tmp_path):
    run_folder = RunFolder(tmp_path / "run", keep=2)
    for step in (5, 10, 15):
        run_folder.save(*trainee, step, extra())
    run_folder.wait()
    names = [path.name for path, _ in kept_checkpoints(run_folder.path)]
    assert names == ["step-00000015.safetensors", "step-00000010.safetensors"]
    newest = tmp_path / "run" / names[0]
    newest.write_bytes(newest.read_bytes()[:-1])
    (tmp_path / "run" / "step-00000020.safetensors").write_bytes(b"never committed")
    faults = [fault for _, fault in kept_checkpoints(run_folder.path)]
    assert "no manifest step-00000020.json beside it" in faults[0]
    assert "its manifest says" in faults[1]
    assert faults[2] is None
    run_folder.unlock()
    (tmp_path / "run" / ".tmpAbc").write_text("left by a kill")
    run_folder = RunFolder(tmp_path / "run", keep=2)
    assert not (tmp_path / "run" / ".tmpAbc").exists()
    assert steps(tmp_path / "run") == [10, 15]  # what was never committed would count as kept
    run_folder.unlock()


def test_a_best_checkpoint_stays_while_a_checkpoint_names_it(trainee, tmp_path):
    """A kill between two files of the newest must leave the older ones complete."""
    run_folder = RunFolder(tmp_path, keep=2)
    seen = []
    for step, best in [(1, 1), (2, 1), (3, 1), (4, 4), (5, 4), (6, 4), (7, 4)]:
        run_folder.save(*trainee, step, extra(best))
        run_folder.wait()
        seen.append(steps(tmp_path))
    assert seen == [[1], [1, 2], [1, 2, 3], [1, 3, 4], [4, 5], [4, 5, 6], [4, 6, 7]]
    run_folder.unlock()


def test_training_goes_on_while_a_checkpoint_is_written(trainee, tmp_path):
    """The write hangs on a pipe that nobody reads yet; meanwhile the weights change."""
    expected = tmp_path / "expected.safetensors"
    save_checkpoint(*trainee, 5, expected, extra())
    run_folder = RunFolder(tmp_path / "run", keep=2)
    manifest = tmp_path / "run" / "step-00000005.json.tmp"
    os.mkfifo(manifest)
    run_folder.save(*trainee, 5, extra())
    with torch.no_grad():
        for parameter in trainee[0].parameters():
            parameter.add_(1.0)
    time.sleep(0.3)
    assert not run_folder.failed
    assert not (tmp_path / "run" / "step-00000005.json").exists()
    reader = threading.Thread(target=manifest.read_bytes)
    reader.start()
    with pytest.raises(EnvironmentFault):  # a pipe cannot be synced: not taken for a success
        run_folder.wait()
    reader.join()
    assert (tmp_path / "run" / "step-00000005.safetensors").read_bytes() == expected.read_bytes()
    run_folder.unlock()


def test_a_save_that_fails_is_told_at_the_next_step_and_the_one_before_stays(trainee, tmp_path):
    """A file-size limit stands in for a full disk; the write fails half way."""
    run_folder = RunFolder(tmp_path, keep=2)
    run_folder.save(*trainee, 5, extra())
    run_folder.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        run_folder.save(*trainee, 10, extra())
        with pytest.raises(EnvironmentFault, match="step-00000010.safetensors: File too large"):
            wait_for_failure(run_folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [(path.name, fault) for path, fault in kept_checkpoints(run_folder.path)] == [
        ("step-00000005.safetensors", None)
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "lock",
        "step-00000005.json",
        "step-00000005.safetensors",
    ]
    run_folder.save(*trainee, 10, extra())  # space again: it goes on
    run_folder.wait()
    assert steps(tmp_path) == [5, 10]
    run_folder.unlock()


def traced(put):
    """A list that grows by what is put on disk and what is renamed, in order."""
    events, fsync, replace = [], os.fsync, os.replace

    def traced_fsync(descriptor):
        fsync(descriptor)
        events.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name))

    def traced_replace(source, target):
        replace(source, target)
        events.append(("rename", Path(target).name))

    put(os, "fsync", traced_fsync)
    put(os, "replace", traced_replace)
    return events


def test_a_checkpoint_is_on_disk_before_its_manifest_and_each_before_its_rename(
    trainee, tmp_path, monkeypatch
):
    run_folder = RunFolder(tmp_path / "run", keep=2)
    events = traced(monkeypatch.setattr)
    run_folder.save(*trainee, 5, extra())
    run_folder.unlock()
    assert events == [
        ("sync", "step-00000005.safetensors.tmp"),
        ("rename", "step-00000005.safetensors"),
        ("sync", "run"),
        ("sync", "step-00000005.json.tmp"),
        ("rename", "step-00000005.json"),
        ("sync", "run"),
    ]


def wait_for_failure(run_folder):
    while not run_folder.failed:
        time.sleep(0.01)
    run_folder.wait()


def test_a_checkpoint_written_behind_restores_every_bit(
    trainee, model_config, train_config, tmp_path
):
    run_folder = RunFolder(tmp_path, keep=2)
    for step in (5, 6):  # the second uses the buffers of the first
        run_folder.save(*trainee, step, extra())
    run_folder.unlock()
    other = trained(model_config, train_config, steps=1, seed=1)
    for step in (5, 6):
        assert load_checkpoint(run_folder.checkpoint(step), *other) == step
        assert_same(trainee, other)


def test_any_flipped_bit_and_any_cut_is_found(model, train_config, tmp_path):
    run_folder = RunFolder(tmp_path, keep=2)
    run_folder.save(model, OPTIMIZERS["adamw"].make(model, train_config), 5, extra())
    run_folder.unlock()
    path = run_folder.checkpoint(5)
    for file in (path, path.with_suffix(".json")):
        data = file.read_bytes()
        places = {*range(0, len(data), max(1, len(data) // 50)), len(data) - 1}
        for place in sorted(places):
            flipped = bytearray(data)
            flipped[place] ^= 1 << place % 8
            for damaged in (bytes(flipped), data[:place]):
                file.write_bytes(damaged)
                if file == path or not_the_same_manifest(damaged, data):
                    with pytest.raises(InputError, match=path.stem):
                        verify(path)
        file.write_bytes(data)
        verify(path)


def not_the_same_manifest(damaged, data):
    """White space and the case of a hash may change without changing what a manifest says."""
    return damaged.lower().split() != data.lower().split()


def link_to(target):
    return lambda path: path.symlink_to(target)


@pytest.mark.parametrize(
    ("name", "put", "said"),
    [
        ("step-00000005.json", lambda path: path.mkdir(), "not a file"),
        ("step-00000005.json", os.mkfifo, "not a file"),
        ("step-00000005.json", link_to("other.json"), "a link"),
        ("step-00000005.json", link_to("step-00000005.json"), "a link"),
        ("step-00000005.safetensors", lambda path: path.mkdir(), "not a file"),
        ("step-00000005.safetensors", link_to("/dev/zero"), "a link"),
        ("step-00000007", lambda path: path.write_text(""), "not a folder"),
        ("lock", lambda path: path.mkdir(), "not a file"),
        ("lock", os.mkfifo, "not a file"),
        ("lock", link_to("other"), "a link"),
        ("", link_to("."), "a link"),
        ("", lambda path: path.write_text(""), "not a folder"),
    ],
)
def test_what_is_no_file_or_folder_of_a_run_is_refused_by_name(trainee, tmp_path, name, put, said):
    run_folder = RunFolder(tmp_path / "run", keep=2)
    run_folder.save(*trainee, 5, extra())
    run_folder.unlock()
    path = tmp_path / "run" / name
    (tmp_path / "run" / "other.json").write_text("{}")
    if path.is_dir():
        path.rename(tmp_path / "before")
    else:
        path.unlink(missing_ok=True)
    put(path)
    with pytest.raises(InputError, match=rf"{path}: {said}; move it away"):
        RunFolder(tmp_path / "run", keep=2)
    if name.startswith("step-00000005"):  # as tools.verify, which only reads
        faults = dict(kept_checkpoints(tmp_path / "run"))
        assert "step-00000005" in faults[tmp_path / "run" / "step-00000005.safetensors"]


def test_a_second_writer_is_refused_by_name(tmp_path):
    run_folder = RunFolder(tmp_path / "run", keep=2)
    with pytest.raises(Busy, match=f"process {os.getpid()} is training this run"):
        RunFolder(tmp_path / "run", keep=2)
    remove_finished(tmp_path / "run")
    assert (tmp_path / "run").exists()  # somebody trains it: not to be removed
    run_folder.unlock()
    remove_finished(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    remove_finished(tmp_path / "run")
