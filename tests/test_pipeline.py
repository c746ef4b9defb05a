"""The pipeline as DVC runs it: reproducible, cached, comparable, and honest about failure."""

import hashlib
import json
import os
import signal

import numpy as np
import pytest
import torch
import yaml

from tests.project import Project, wait_for

STAGES = ("corpus", "tokenizer", "tokens", "train", "evaluate")


def versioned(folder):
    """A project under git and DVC, committed."""
    project = Project(folder)
    for command in (
        ("init", "-q"),
        ("config", "user.name", "test"),
        ("config", "user.email", "test@example.org"),
        ("add", "-A"),
        ("commit", "-qm", "start"),
    ):
        result = project.run("git", *command)
        assert result.returncode == 0, result.stderr
    return project


def dvc(project, *arguments, code=0):
    result = project.run("dvc", *arguments)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout


@pytest.fixture
def project(tmp_path):
    project = versioned(tmp_path / "project")
    yield project
    project.close()


def ran(output):
    """The stages that a `dvc repro` really ran."""
    return [s for s in STAGES if f"Running stage '{s}'" in output]


# what may differ between two clones, beside their paths and the time
HERE = {"OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "1", "RAYON_NUM_THREADS": "2"}
THERE = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "2", "RAYON_NUM_THREADS": "1",
         "TZ": "Asia/Kathmandu", "LANG": "C", "LC_ALL": "C"}  # fmt: skip


def test_two_clones_reproduce_the_same_lock_and_a_second_run_does_nothing(tmp_path):
    """At other paths and times, with other threads, hash seed, locale, time zone and umask."""
    locks, files = [], []
    for name, environment, umask in (
        ("here", HERE, "022"),
        ("a longer name, with späces", THERE, "077"),
    ):
        project = versioned(tmp_path / name)
        project.set("data.packages", ["networkx==3.6.1"])
        project.set("data.path", "data/raw")
        project.set("train.num_threads", 1)  # two on busy cores are slow
        result = project.run("sh", "-c", f"umask {umask}; exec dvc repro", **environment)
        assert ran(result.stdout) == list(STAGES), result.stderr
        assert "Device: cpu (1 threads" in result.stdout
        (entry,) = json.loads(project.read("data/corpus.json"))
        assert (entry["package"], entry["version"]) == ("networkx", "3.6.1")
        assert (
            hashlib.sha256(project.read("data/raw/networkx.jsonl")).hexdigest() == entry["sha256"]
        )
        locks.append(project.read("dvc.lock"))
        outs = [o["path"] for stage in yaml.safe_load(locks[-1])["stages"].values()
                for o in stage["outs"]]  # fmt: skip
        files.append({f.relative_to(project.folder): f.read_bytes() for out in outs
                      for f in (project.folder / out, *(project.folder / out).rglob("*"))
                      if f.is_file()})  # fmt: skip
        assert "up to date" in dvc(project, "status")
        assert ran(dvc(project, "repro")) == []
        project.close()
    assert locks[0] == locks[1]
    assert files[0] == files[1]
    assert len(files[0]) > 15
    hashed = yaml.safe_load(locks[0])["stages"]["train"]["outs"]
    assert {out["path"] for out in hashed} >= {"models/model", "models/checkpoints"}
    assert "performance" not in locks[0].decode()


def test_provenance_says_what_made_the_model_and_no_clock_path_or_commit(project):
    dvc(project, "repro")
    commit = project.run("git", "rev-parse", "HEAD").stdout.strip()
    text = project.read("models/model/provenance.json").decode()
    provenance = json.loads(text)
    assert provenance["train"]["lr"] == 0.01
    assert provenance["model"]["d_model"] == 32
    for name in (
        "data/tokens/train/text-00000.bin",
        "data/tokens/tokens.json",
        "data/tokenizer/tokenizer.json",
    ):
        assert provenance["inputs"][name] == hashlib.sha256(project.read(name)).hexdigest()
    deps = yaml.safe_load(project.read("dvc.yaml"))["stages"]["train"]["deps"]
    code = {name: hashlib.sha256(project.read(name)).hexdigest() for name in deps
            if name.endswith(".py")}  # fmt: skip
    assert provenance["code"] == code
    environment = provenance["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["numpy"] == np.__version__
    assert environment["device"].startswith("cpu (1 threads, ")
    for forbidden in (commit[:12], str(project.folder), os.uname().nodename):
        assert forbidden not in text, forbidden


def test_each_change_reruns_what_depends_on_it_and_nothing_else(project):
    dvc(project, "repro")
    for key, value, expected in [
        ("runtime.log_interval", 7, []),
        ("evaluate.max_new_tokens", 5, ["evaluate"]),
        ("train.lr", 2e-3, ["train", "evaluate"]),
        ("model.d_ff", 96, ["train", "evaluate"]),
        ("data.valid_fraction", 0.3, ["tokenizer", "tokens", "train", "evaluate"]),
    ]:
        project.set(key, value)
        assert ran(dvc(project, "repro")) == expected, key
    project.set("tokenizer.kind", "bytes")  # now the tokenizer stays the same for any text
    assert ran(dvc(project, "repro")) == ["tokenizer", "tokens", "train", "evaluate"]
    project.set("data.valid_fraction", 0.25)
    assert ran(dvc(project, "repro"))[:2] == ["tokenizer", "tokens"]
    project.set("tokenizer.kind", "bpe")
    text = project.folder / "text" / "00.txt"
    text.write_text(text.read_text() + "one more line\n")
    assert "tokens" in ran(dvc(project, "repro"))
    project.set("train.lr", 1e-2)
    project.set("model.d_ff", 64)
    project.set("data.valid_fraction", 0.2)
    text.write_text(text.read_text().replace("one more line\n", ""))
    assert ran(dvc(project, "repro")) == []  # this very state was run before: restored from cache


def test_a_failing_stage_says_why_in_one_line_and_leaves_the_others(project):
    dvc(project, "repro")
    before = project.read("data/tokens/train/text-00000.bin")
    project.set("model.num_heads", 3)
    result = project.run("dvc", "repro")
    assert result.returncode != 0
    assert "error: params.yaml: model.d_model = 32 is not divisible by" in result.stderr
    assert "Traceback" not in result.stderr
    assert project.read("data/tokens/train/text-00000.bin") == before
    project.set("model.num_heads", 2)
    assert ran(dvc(project, "repro")) == []


def test_an_interrupted_repro_is_no_success_and_goes_on(tmp_path, project):
    undisturbed = versioned(tmp_path / "undisturbed")
    for each in (undisturbed, project):
        each.set("train.max_steps", 400)
    dvc(undisturbed, "repro")
    process = project.start("dvc", "repro")
    wait_for(process, "step  50/400")
    (lock,) = (project.folder / ".dvc" / "tmp" / "lm-resume").glob("*/lock")
    os.kill(int(lock.read_text()), signal.SIGTERM)
    _, error = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "stopped, saved at step" in error
    assert "train" not in yaml.safe_load(project.read("dvc.lock"))["stages"]
    assert "Resumed at step " in dvc(project, "repro")
    assert project.read("dvc.lock") == undisturbed.read("dvc.lock")
