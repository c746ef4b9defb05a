"""The pipeline as DVC runs it: reproducible, cached, comparable, and honest about failure."""

import hashlib
import json
import os
import re

import numpy as np
import torch
import yaml

from tests.kill import STAGES, dvc, git, outputs, ran, run, versioned

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
        project.set("corpus.packages", ["networkx==3.6.1"])
        project.set("data.path", "data/raw")
        project.set("data.valid_fraction", 0.02)
        project.set("train.num_threads", 1)  # two on busy cores are slow
        given = [f"{key}={value}" for key, value in environment.items()]
        done = run(project, "env", *given, "sh", "-c", f"umask {umask}; exec dvc repro")
        assert ran(done.stdout) == list(STAGES), done.stdout
        assert "Device: cpu (1 thread," in done.stdout
        (entry,) = json.loads(project.read("data/corpus.json"))
        assert (entry["package"], entry["version"]) == ("networkx", "3.6.1")
        assert (
            hashlib.sha256(project.read("data/raw/networkx.jsonl")).hexdigest() == entry["sha256"]
        )
        licenses = project.read("data/licenses.txt")
        assert b"networkx==3.6.1: BSD-3-Clause\n\n" in licenses
        assert b"Copyright (c) 2004-2025, NetworkX Developers" in licenses
        assert project.read("models/huggingface/TEXT_LICENSES.txt") == licenses
        assert b"- networkx==3.6.1: BSD-3-Clause\n" in project.read("models/huggingface/README.md")
        locks.append(project.read("dvc.lock"))
        files.append(outputs(project))
        outs = [out["path"] for stage in yaml.safe_load(locks[-1])["stages"].values()
                for out in stage["outs"]]  # fmt: skip
        for out in outs:
            assert any(file == out or file.startswith(f"{out}/") for file in files[-1]), out
        assert "up to date" in dvc(project, "status")
        assert ran(dvc(project, "repro")) == []
    assert locks[0] == locks[1]
    assert files[0] == files[1]
    assert len(files[0]) > 15
    hashed = yaml.safe_load(locks[0])["stages"]["train"]["outs"]
    assert {out["path"] for out in hashed} >= {"models/model", "models/checkpoints"}
    assert "performance" not in locks[0].decode()


def test_provenance_says_what_made_the_model_and_no_clock_path_or_commit(baseline):
    project = baseline
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
    code = provenance["code"]
    assert {"lm/model/transformer.py", "lm/train/step.py", "stages/train.py"} <= code.keys()
    for name, sha256 in code.items():
        assert sha256 == hashlib.sha256(project.read(name)).hexdigest()
        assert name in deps or any(name.startswith(f"{dep}/") for dep in deps), name
    environment = provenance["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["numpy"] == np.__version__
    assert environment["device"].startswith("cpu (1 thread, ")
    commits = [commit[:12] for commit in git(project, "rev-list", "HEAD").split()]
    for forbidden in (*commits, str(project.folder), os.uname().nodename):
        assert forbidden not in text, forbidden


def test_each_change_reruns_what_depends_on_it_and_nothing_else(finished):
    for key, value, expected in [
        ("runtime.log_interval", 7, []),
        ("evaluate.max_new_tokens", 5, ["evaluate"]),
        ("train.lr", 2e-3, ["train"]),
        ("data.valid_fraction", 0.3, ["tokenizer", "tokens"]),
    ]:
        section, name = key.split(".")
        before = finished.params[section][name]
        finished.set(key, value)
        assert ran(dvc(finished, "repro", "--dry")) == expected, key  # before their outputs change
        finished.set(key, before)
    finished.set("model.d_ff", 96)
    assert ran(dvc(finished, "repro")) == ["train", "evaluate", "export"]
    finished.set("tokenizer.kind", "bytes")  # now the tokenizer stays the same for any text
    assert ran(dvc(finished, "repro", "tokens")) == ["tokenizer", "tokens"]
    text = finished.folder / "text" / "00.txt"
    text.write_text(text.read_text() + "one more line\n")
    tokenizer = outputs(finished)["data/tokenizer/tokenizer.json"]
    assert ran(dvc(finished, "repro", "tokens")) == ["tokenizer", "tokens"]
    assert outputs(finished)["data/tokenizer/tokenizer.json"] == tokenizer
    finished.set("tokenizer.kind", "bpe")
    finished.set("model.d_ff", 64)
    text.write_text(text.read_text().replace("one more line\n", ""))
    assert ran(dvc(finished, "repro")) == []  # this very state was run before: restored from cache


def test_code_runs_again_only_the_stages_that_read_its_wing(finished):
    """What a person runs beside the pipeline is read by none; torch never sees how text is read."""

    def edit(*names):
        for name in names:
            file = finished.folder / name
            file.write_text(file.read_text() + "# edited\n")

    edit("tools/verify.py", "tools/heal/heal.py", "tools/report/page.py")
    assert "up to date" in dvc(finished, "status")
    edit("lm/prepare/readers/parquet.py", "lm/prepare/documents.py")
    assert ran(dvc(finished, "repro")) == ["tokenizer", "tokens"]
    edit("lm/export/card.py", "lm/generate/decoder.py")
    assert ran(dvc(finished, "repro", "--dry")) == ["evaluate", "export"]


def test_a_diverged_training_leaves_its_curves_to_plots_and_report(finished):
    for key, value in (("model.norm", "none"), ("train.weight_decay", 0.0), ("train.lr", 2.0)):
        finished.set(key, value)
    finished.set("train.warmup_steps", 18)
    said = dvc(finished, "repro", code=255)
    assert "curves up to there: metrics/curves.csv\n" in said
    (step,) = re.findall(r"error: \D+ at step (\d+); ", said)
    curves = finished.read("metrics/curves.csv").decode().splitlines()
    assert curves[-1].startswith(f"{int(step) - 1},")
    assert json.loads(finished.read("metrics/train.json"))["diverged_at_step"] == int(step)
    for tool in ("tools.report", "tools.report.plots"):
        done = run(finished, "python", "-m", tool)
        assert done.returncode == 0, done.stdout
    report = finished.read("metrics/report.html").decode()
    assert f"then it diverged, at step {step}: there is no model" in report
    assert "Predictor" not in report  # results lie there, of the run before
    assert (finished.folder / "plots" / "loss_by_wall-clock.svg").exists()
    finished.set("train.lr", 1e-2)
    dvc(finished, "repro")
    assert "diverged" not in finished.read("metrics/train.json").decode()


def test_a_failing_stage_says_why_in_one_line_and_leaves_the_others(finished):
    before = outputs(finished)
    finished.set("model.num_heads", 3)
    said = dvc(finished, "repro", code=255)
    assert "error: params.yaml: model.d_model = 32 is not divisible by" in said
    assert "Traceback" not in said
    for name in ("data/tokens/train/text-00000.bin", "data/tokenizer/tokenizer.json"):
        assert outputs(finished)[name] == before[name]
    finished.set("model.num_heads", 2)
    assert ran(dvc(finished, "repro")) == []
    assert outputs(finished) == before
