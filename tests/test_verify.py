"""`python -m tools.verify`: what DVC's trust in sizes and times lets through is found and named."""

import json
import os
import re
import subprocess

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.kill import dvc, survivors
from tests.project import one_line


@pytest.fixture
def project(finished):
    """A project whose pipeline has run, to be damaged."""
    return finished


def verify(project, *arguments, code=0):
    """Standard output of `python -m tools.verify`, and its one line on stderr."""
    done = project.warm("tools.verify", *arguments, environment=project.environment())
    assert done["status"] == code, done["out"] + done["err"]
    result = subprocess.CompletedProcess(arguments, code, done["out"], done["err"])
    return result.stdout, one_line(result) if code else ""


def flip(file, place=0.5):
    """Flip one bit and leave size and times as they were, as a failing disk does."""
    status, mode = file.stat(), file.stat().st_mode
    data = bytearray(file.read_bytes())
    data[int(len(data) * place)] ^= 4
    file.chmod(0o644)
    file.write_bytes(data)
    file.chmod(mode)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (
        status.st_size,
        status.st_mtime_ns,
    )


def test_a_finished_pipeline_is_without_fault(project):
    out, _ = verify(project)
    assert out.count("ok: ") == 4
    assert "fault" not in out


def test_a_flipped_bit_in_the_workspace_is_found(project):
    names = (
        "models/model/model.safetensors",
        "models/checkpoints/best.safetensors",
        "data/tokens/train/text-00000.bin",
        "data/tokenizer/tokenizer.json",
        "metrics/curves.csv",
    )
    for name in names:
        flip(project.folder / name)
    flip(project.folder / names[0], 0)  # in the header: it cannot even be opened
    flip(project.folder / "text" / "07.txt")
    out, error = verify(project, code=2)
    for name in names:
        assert f"fault: {name}: md5 " in out
    assert "fault: text: differs from what the stages read" in out
    assert error.endswith(" faults found")
    flip(project.folder / "text" / "07.txt")
    advice = re.findall(r"^fault: (\S+): md5 .*; delete it, then `dvc (.*)` restores", out, re.M)
    assert {name for name, _ in advice} == set(names)
    for name, command in advice:
        (project.folder / name).unlink()
        dvc(project, *command.split())
    verify(project)


def test_a_flipped_bit_in_the_cache_is_found(project):
    cache = project.folder / ".dvc" / "cache" / "files" / "md5"
    objects = sorted(file for file in cache.rglob("*") if file.is_file())
    listing = next(file for file in objects if file.suffix == ".dir")
    damaged = [listing, max(objects, key=lambda f: f.stat().st_size)]
    flip(damaged[1])
    assert "up to date" in dvc(project, "status")  # DVC does not see it
    flip(listing)
    out, _ = verify(project, code=2)
    for file in damaged:
        assert f"fault: {file}: md5 " in out
    assert out.count("the cache is damaged") == 2


DAMAGE = """
import sys
from pathlib import Path
from tools import verify
from dvc.repo import Repo
repo = Repo()
for name in sys.argv[1:]:
    file, found = Path(name), []
    data = file.read_bytes()
    for place in range(0, len(data), max(1, len(data) // 6)):
        for damaged in (data[:place], data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]):
            file.write_bytes(damaged)
            checks = (verify.recorded_faults(repo), verify.belonging_faults(),
                      verify.checkpoint_faults())
            found.append(any([verify._complete(faults) for faults in checks]))
    file.unlink()
    for faults in (verify.belonging_faults(), verify.checkpoint_faults()):
        verify._complete(faults)
    file.write_bytes(data)
    print(name, found.count(True) / len(found))
"""


def test_any_damage_is_a_line_and_no_traceback(project):
    """In one process: what the command line asks in turn."""
    names = ("models/model/model.safetensors", "models/model/provenance.json",
             "models/model/config.json", "models/checkpoints/last.safetensors",
             "models/checkpoints/best.json", "data/tokens/tokens.json", "dvc.lock")  # fmt: skip
    result = project.run("python", "-c", DAMAGE, *names)
    assert result.returncode == 0, result.stderr
    shares = dict(line.split() for line in result.stdout.splitlines())
    assert float(shares.pop("dvc.lock")) > 0.6  # sizes, commands and settings are not looked at
    assert set(shares.values()) == {"1.0"}


def test_missing_and_added_files_are_found(project):
    (project.folder / "models" / "model" / "config.json").rename(
        project.folder / "models" / "model" / "notes.txt"
    )
    out, _ = verify(project, code=2)
    assert "fault: models/model/config.json: missing" in out
    assert "fault: models/model/notes.txt: not among the recorded files" in out


def test_what_does_not_belong_together_is_named(project):
    """As after copying files about by hand: each is whole, and they do not fit."""
    folder = project.folder / "models"
    tensors = load_file(folder / "model" / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model" / "model.safetensors")
    tokenizer = (folder / "model" / "tokenizer.json").read_text()
    (folder / "model" / "tokenizer.json").write_text(tokenizer + "\n")
    provenance = json.loads((folder / "model" / "provenance.json").read_text())
    provenance["train"]["lr"] = 1
    (folder / "model" / "provenance.json").write_text(json.dumps(provenance))
    code = (project.folder / "lm" / "train" / "optim.py").read_text()
    (project.folder / "lm" / "train" / "optim.py").write_text(code + "# another\n")
    out, _ = verify(project, code=2)
    for words in (
        "model.safetensors: its weights differ from those in models/checkpoints/last.safetensors",
        "model.safetensors: lm_head.weight: 1 of",
        "models/model/tokenizer.json: differs from data/tokenizer/tokenizer.json",
        "checkpoints/last.safetensors: belongs to another run than models/model/provenance.json",
        "lm/train: differs from what the stages read",
        "lm/train/optim.py: changed since it made the model",
    ):
        assert words in out, words


def test_a_damaged_checkpoint_of_an_unfinished_run_is_named_and_one_that_was_cut_is_no_fault(
    project,
):
    project.train_until("step   40/", "train.max_steps=5000", warm=True).kill()
    project.processes[-1].wait()
    assert survivors(project) == []
    runs_root = project.folder / ".dvc" / "tmp" / "lm-resume"
    newest = max(runs_root.glob("*/step-*.json")).with_suffix(".safetensors")
    flip(newest)
    out, _ = verify(project, code=2)
    assert f"fault: {newest.relative_to(project.folder)}: content differs" in out
    newest.with_suffix(".json").unlink()  # killed between a checkpoint and its manifest
    verify(project)


def test_replay_computes_the_same_weights_again(project):
    last = project.folder / "models" / "checkpoints" / "last.safetensors"
    with safe_open(last, framework="pt") as file:
        extra = json.loads(file.metadata()["checkpoint"])["extra"]
    assert sorted(map(int, extra["weights"])) == [8, 16, 20]
    out, _ = verify(project, "--replay", "17")
    assert "ok: replayed steps 1 to 17: the weights at step 8, step 16 are the same" in out
    _, error = verify(project, "--replay", "3", code=2)
    assert "the next recorded weights are of step 8; use --replay 8" in error
    _, error = verify(project, "--replay", "21", code=2)
    assert "the run had 20 steps" in error
    other = project.run("python", "-m", "tools.verify", "--replay", "8", OMP_NUM_THREADS="2")
    assert other.returncode == 3
    error = one_line(other)
    assert "device is cpu (1 thread," in error
    assert "here device is cpu (2 threads" in error


def test_replay_goes_on_from_the_best_checkpoint(project):
    changes = {"lr": 10.0, "muon_lr": 2.0, "warmup_steps": 20, "max_grad_norm": None,
               "eval_interval": 4, "schedule": "constant"}  # fmt: skip
    for key, value in changes.items():  # rates that rise so high that the best is not the last
        project.set(f"train.{key}", value)
    dvc(project, "repro", "train")
    best = json.loads(project.read("metrics/train.json"))["best_step"]
    assert best < 20
    out, _ = verify(project, "--replay", str(20 - best))
    assert f"replayed steps {best + 1} to 20: the weights at step {best + 4}" in out


def test_replay_finds_other_weights(project):
    """A kernel that rounds otherwise, as it were: one line of the model's code."""
    file = project.folder / "tools" / "verify.py"  # not among the code that made the model
    before = "        start = _restore_start("
    edit = "        state.model.lm_head.weight.data[0, 0] += 1e-7\n"
    file.write_text(file.read_text().replace(before, edit + before))
    _, error = verify(project, "--replay", "8", code=2)
    assert "replay from step 0: weights differ at step 8" in error


def test_without_a_lock_it_says_what_to_do(project):
    (project.folder / "dvc.lock").unlink()
    _, error = verify(project, code=2)
    assert "dvc.lock: no such file; run `make repro`" in error
