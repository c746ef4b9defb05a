"""The stages as a user runs them: command line, interruption, resumption, bad input."""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lm.base.sections import read_section
from lm.prepare.documents import split_documents
from lm.prepare.learn import train_bpe
from lm.prepare.sources import DataConfig
from tests.kill import copied, lent, outputs, survivors
from tests.project import ROOT, one_line, wait_for
from tests.test_baselines import by_hand

LAST = "models/checkpoints/last.safetensors"


@pytest.fixture
def prepared(long_run, tmp_path):
    """A project whose tokens are made."""
    with lent(long_run[0], tmp_path / "project") as project:
        project.set("train.max_steps", 20)
        project.set("train.eval_interval", 10)
        yield project


@pytest.fixture
def long(long_run, tmp_path):
    """A project whose run is long enough to be caught, and its outputs when left alone."""
    with lent(long_run[0], tmp_path / "project") as project:
        yield project, long_run[1]


@pytest.fixture
def killed(long_run, made_once, tmp_path):
    """The same after SIGKILL at step 40."""

    def make(folder):
        project = copied(long_run[0], folder / "project")
        project.train_until("step  40/", warm=True).kill()
        project.close()
        assert survivors(project) == []
        project.processes.clear()
        return project

    with lent(made_once("killed", make), tmp_path / "project") as project:
        yield project, long_run[1]


def newest_checkpoint(project):
    """The newest that was committed: a kill can leave one without its manifest."""
    (folder,) = run_folders(project)
    return max(folder.glob("step-*.json")).with_suffix(".safetensors")


def run_folders(project):
    return list((project.folder / ".dvc" / "tmp" / "lm-resume").glob("*"))


def test_training_tells_what_it_does_in_order(prepared):
    result = prepared.stage("train")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.strip().split("\n")
    lines = [line for line in lines if "by the pace" not in line]  # where steps take long
    assert lines[0].startswith("Device: cpu (1 thread,")
    tokens = json.loads(prepared.read("data/tokens/tokens.json"))["train"]["tokens"]
    assert lines[1] == f"Loaded dataset with {tokens:,} tokens"
    parameters = json.loads(prepared.read("metrics/train.json"))["parameters"]
    assert lines[2] == f"Model has {parameters:,} parameters"
    assert lines[3].startswith("Plan: 20 steps of ")
    assert lines[4].startswith("Plan: not compiled: ")
    for words in ("step  5/20", "loss ", "average ", "lr ", "grad norm ", "tokens/s", "ETA "):
        assert words in lines[5]
    assert lines[7].startswith("step 10: validation loss ")
    assert lines[-1].startswith("Final loss ")
    assert "models/model" in lines[-1]
    (finished,) = run_folders(prepared)  # stays until DVC has recorded the outputs
    first = outputs(prepared)
    again = prepared.stage("train")
    assert f"Resumed at step 20; it is finished: delete .dvc/tmp/lm-resume/{finished.name}" in (
        again.stdout
    )
    assert "step  5/20" not in again.stdout
    assert outputs(prepared) == first
    prepared.prepare("evaluate")
    assert not run_folders(prepared)
    metrics = json.loads(prepared.read("metrics/train.json"))
    assert metrics["step"] == 20
    assert metrics["tokens"] == 20 * 4 * 64
    speed = json.loads(prepared.read("metrics/performance.json"))
    assert 0 < speed["mfu"] < 1.5
    assert speed["peak_memory_bytes"] > 1e8
    assert speed["memory_bytes"]["measured"] == speed["peak_memory_bytes"]
    assert speed["memory_bytes"]["predicted"] > 1e8
    assert speed["seconds"]["predicted"] > 0
    assert speed["seconds"]["measured"] > 0
    assert (speed["micro_batch_size"], speed["compiled"]) == (4, False)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_streams_may_be_closed(prepared, closed):
    before = outputs(prepared)
    prepared.forget_shards()
    done = prepared.run("sh", "-c", f"exec python -m stages.tokens {closed}")
    assert done.returncode == 0
    assert done.stderr == ""
    assert outputs(prepared) == before


def test_settings_are_overridden_from_the_command_line(prepared):
    result = prepared.stage("train", "train.lr=1e-3", "model.num_layers=1", "train.max_steps=3")
    assert result.returncode == 0, result.stderr
    config = json.loads(prepared.read("models/model/config.json"))
    assert config["num_layers"] == 1
    assert "step 3/3" in result.stdout
    assert "lr 1.00e-04" in result.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_run_goes_on_to_the_same_bytes(long, number, code):
    project, straight = long
    process = project.train_until("step  40/")
    process.send_signal(number)
    _, error = process.communicate(timeout=300)
    assert process.returncode == code
    assert error.startswith("stopped, saved at step ")
    step = int(error.split("saved at step ")[1].split(";")[0])
    result = project.stage("train")
    assert result.returncode == 0, result.stderr
    assert f"Resumed at step {step}\n" in result.stdout  # not one step is lost
    assert outputs(project) == straight


@pytest.mark.parametrize("command", ["stages.train", "lm.plan"])
def test_ctrl_c_while_torch_is_imported_is_no_traceback(prepared, command):
    (prepared.folder / "torch.py").write_text("raise KeyboardInterrupt\n")
    result = prepared.run("python", "-m", command)
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "stopped\n")


@pytest.mark.skipif(sys.platform != "linux", reason="libraries are mapped in other ways")
def test_too_little_memory_for_torch_is_one_line(prepared):
    result = prepared.run("bash", "-c", "ulimit -v 200000; exec python -m stages.train")
    assert (result.returncode, "ulimit -v" in one_line(result)) == (3, True)


def test_a_killed_run_goes_on_to_the_same_bytes(killed):
    project, straight = killed
    result = project.stage("train")
    assert result.returncode == 0, result.stderr
    step = int(result.stdout.split("Resumed at step ")[1].split()[0])
    assert step >= 30  # one checkpoint interval, and one that was being written
    assert outputs(project) == straight


YESTERDAY = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec -= 86400;
    return result;
}
"""


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler to build a clock that is late")
def test_a_clock_set_back_changes_nothing(killed, tmp_path):
    project, straight = killed
    (tmp_path / "clock.c").write_text(YESTERDAY)
    library = str(tmp_path / "clock.so")
    build = ("cc", "-shared", "-fPIC", "-o", library, str(tmp_path / "clock.c"), "-ldl")
    assert project.run(*build).returncode == 0
    now = "import time; print(time.time())"
    shown = project.run("python", "-c", now, LD_PRELOAD=library).stdout
    assert float(shown) < time.time() - 86_000
    for file in project.folder.rglob("step-*"):
        os.utime(file, (2e9, 2e9))
    result = project.run("python", "-m", "stages.train", LD_PRELOAD=library)
    assert "Resumed at step " in result.stdout
    assert outputs(project) == straight


def test_a_damaged_newest_checkpoint_is_passed_over(killed):
    project, straight = killed
    newest = newest_checkpoint(project)
    newest.write_bytes(newest.read_bytes()[:-100])
    result = project.stage("train")
    assert f"warning: {os.path.relpath(newest, project.folder)}: " in result.stdout
    assert "; skipped" in result.stdout
    assert "Resumed at step " in result.stdout
    assert outputs(project) == straight


def change_text(project):
    file = project.folder / "text" / "00.txt"
    file.write_text(file.read_text() + "one more line\n")
    project.prepare("tokens")


def change_tokenizer(project):
    project.set("tokenizer.vocab_size", 301)
    project.prepare("tokenizer", "tokens")


def change_code(project):
    file = project.folder / "lm" / "model" / "transformer.py"
    file.write_text(file.read_text() + "\n# a comment\n")


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        (change_text, "data/tokens/tokens.json, data/tokens/train/text-00000.bin"),
        (change_code, "lm/model/transformer.py"),
        (change_tokenizer, "model.vocab_size 300 -> 301, data/tokenizer/tokenizer.json, data/"),
        (lambda project: project.set("train.lr", 9e-3), "train.lr 0.01 -> 0.009"),
        (lambda project: project.set("model.dropout", 0.1), "model.dropout 0.0 -> 0.1"),
    ],
    ids=["text", "code", "tokenizer", "lr", "dropout"],
)
def test_nothing_of_a_run_is_reused_after_a_change_and_it_says_why(killed, change, differing):
    project, _ = killed
    change(project)
    result = project.stage("train")
    assert result.returncode == 0, result.stderr
    line = re.search(r"^1 other run keeps .* MB in .*; that, at step (\d+), is not resumed because "
                     "of (.*)$", result.stdout, re.M)  # fmt: skip
    assert int(line[1]) >= 30
    assert line[2].startswith(differing)
    assert line[2] == differing or "data/" in differing
    assert len(run_folders(project)) == 2
    assert "Resumed" not in result.stdout


def test_nothing_of_a_run_is_reused_with_another_number_of_threads(killed):
    project, _ = killed
    after = project.start("python", "-m", "stages.train", OMP_NUM_THREADS="2")
    for line in after.stdout:
        assert "Resumed" not in line
        if line.startswith("1 other run "):
            assert re.search(r"environment.device cpu \(1 thread, .*\) -> cpu \(2 threads, ", line)
        if line.startswith("step "):
            break
    assert len(run_folders(project)) == 2


def test_a_change_of_runtime_goes_on(killed):
    project, straight = killed
    assert "Resumed at step " in project.stage("train", "runtime.log_interval=1").stdout
    assert outputs(project) == straight


def test_a_second_trainer_of_the_same_run_is_refused(prepared):
    prepared.set("train.max_steps", 99999)
    first = prepared.train_until("step ")
    second = prepared.stage("train")
    assert second.returncode == 75
    assert f"process {first.pid} is training this run" in one_line(second)


def test_a_run_is_continued_from_a_checkpoint_with_more_steps(prepared):
    prepared.set("train.schedule", "constant")
    prepared.set("train.max_steps", 30)
    prepared.prepare("train")
    straight = prepared.read("models/model/model.safetensors"), prepared.read("metrics/curves.csv")
    prepared.set("train.max_steps", 20)
    prepared.prepare("train")
    refused = prepared.stage("train", resume_from=LAST)
    assert refused.returncode == 2
    assert "is at step 20, train.max_steps = 20; nothing is left to do" in one_line(refused)
    result = prepared.stage("train", "train.max_steps=30", resume_from=LAST)
    assert result.returncode == 0, result.stderr
    assert "Continuing models/checkpoints/last.safetensors from step 20" in result.stdout
    assert "lr 1.00e-02" in result.stdout
    assert straight == (
        prepared.read("models/model/model.safetensors"),
        prepared.read("metrics/curves.csv"),
    )
    folder = prepared.folder / "models" / "checkpoints"

    def refused(message, *overrides):
        result = prepared.stage("train", "train.max_steps=40", *overrides, resume_from=LAST)
        assert result.returncode == 2
        assert message in one_line(result)

    refused("model.num_layers = 2 there, 1 here", "model.num_layers=1")
    data = (folder / "last.safetensors").read_bytes()
    (folder / "last.safetensors").write_bytes(data[:-1])
    refused("its manifest says")
    (folder / "last.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused("content differs from the hash in its manifest")
    (folder / "last.safetensors").write_bytes(data)
    manifest = (folder / "last.json").read_bytes()
    (folder / "last.json").unlink()
    refused("no manifest last.json beside it")
    (folder / "last.json").write_bytes(manifest)
    change_text(prepared)
    refused("made with another inputs.data/tokens/tokens.json = ")
    (folder / "last.safetensors").unlink()
    refused("no such file")


def test_a_checkpoint_of_another_run_in_the_folder_is_not_resumed(killed):
    project, _ = killed
    (killed_run,) = run_folders(project)
    project.set("train.seed", 2)
    project.prepare("train")
    straight = outputs(project)
    (other,) = set(run_folders(project)) - {killed_run}
    for file in other.glob("step-*"):
        file.unlink()
    for file in killed_run.glob("step-*"):
        shutil.copy(file, other)
    result = project.stage("train")
    assert "of another run: train.seed 1337 -> 2; skipped" in result.stdout
    assert "Resumed" not in result.stdout
    assert "step   5/" in result.stdout  # from the beginning
    assert outputs(project) == straight


def test_a_run_whose_best_checkpoint_is_damaged_begins_anew(killed):
    project, straight = killed
    (folder,) = run_folders(project)
    checkpoints = [path.with_suffix(".safetensors") for path in folder.glob("step-*.json")]
    bests = set()
    for checkpoint in checkpoints:
        with safe_open(checkpoint, framework="pt") as file:
            step = json.loads(file.metadata()["checkpoint"])["extra"]["best"]["step"]
        if step is not None:
            bests.add(checkpoint.with_name(f"step-{step:08}.safetensors"))
    assert bests
    for best in bests:
        best.write_bytes(best.read_bytes()[:-1])
    result = project.stage("train")
    assert all(f"/{best.name}: " in result.stdout for best in bests)
    assert "Resumed" not in result.stdout
    assert outputs(project) == straight


def test_text_in_the_folder_of_the_corpus_stage_is_not_deleted(project):
    project.set("corpus.packages", [f"networkx=={version('networkx')}"])
    project.prepare("corpus")
    project.set("corpus.packages", [])
    project.prepare("corpus")
    assert list((project.folder / "data" / "raw").iterdir()) == []  # what it wrote itself goes
    (project.folder / "data" / "raw" / "mine.txt").write_text("precious")
    result = project.stage("corpus")
    assert result.returncode == 2
    assert "data/raw/mine.txt: not written by this stage" in one_line(result)
    assert project.read("data/raw/mine.txt") == b"precious"


def test_early_stopping_keeps_the_best_model(prepared):
    # the lr is so high that validation soon stops improving
    overrides = ("train.early_stopping=2", "train.eval_interval=1", "train.max_steps=200",
                 "train.lr=0.5", "train.warmup_steps=0", "train.max_grad_norm=null")  # fmt: skip
    result = prepared.stage("train", *overrides)
    assert result.returncode == 0, result.stderr
    metrics = json.loads(prepared.read("metrics/train.json"))
    assert metrics["step"] == metrics["best_step"] + 2 < 200
    assert metrics["best_valid_loss"] < metrics["valid_loss"]
    model = load_file(prepared.folder / "models/model/model.safetensors")
    best = load_file(prepared.folder / "models/checkpoints/best.safetensors")
    last = load_file(prepared.folder / "models/checkpoints/last.safetensors")
    assert all(torch.equal(tensor, best[f"model.{key}"]) for key, tensor in model.items())
    assert not torch.equal(best["model.lm_head.weight"], last["model.lm_head.weight"])
    result = prepared.stage("train", *overrides, resume_from=LAST)
    assert result.returncode == 0, result.stderr
    continued = json.loads(prepared.read("metrics/train.json"))
    assert continued["step"] >= metrics["step"] + 2  # its patience begins anew


def test_a_model_worse_than_it_was_and_than_the_bigram_says_so_everywhere(prepared):
    prepared.set("model.norm", "none")
    for key, value in (("eval_interval", 1), ("lr", 0.2), ("warmup_steps", 3), ("max_steps", 5)):
        prepared.set(f"train.{key}", value)
    trained = prepared.stage("train").stdout.splitlines()[-1]
    assert re.match(r"warning: best validation was step \d+ \(.*\), published step 5 \(", trained)
    said = prepared.stage("evaluate").stdout.splitlines()
    assert re.match(r"warning: the model \(.*\) is worse than the bigram baseline \(", said[-2])
    assert said[-1] == trained
    pytest.importorskip("vl_convert")
    assert prepared.run("python", "-m", "tools.report").returncode == 0
    report = prepared.read("metrics/report.html").decode()
    for line in said[-2:]:
        assert line.capitalize() in prepared.read("metrics/summary.md").decode()
        assert f"{line.capitalize()}." in report


@pytest.mark.parametrize("max_steps", [1, 20])
def test_divergence_exits_4_and_publishes_nothing(prepared, max_steps):
    result = prepared.stage("train", "train.lr=1e30", "train.max_grad_norm=null",
                            "train.warmup_steps=0", "train.weight_decay=0",
                            f"train.max_steps={max_steps}")  # fmt: skip
    assert result.returncode == 4
    said = "validation loss is nan at step 1" if max_steps == 1 else "is nan at step 2"
    assert said in one_line(result)
    assert "last good checkpoint: no checkpoint yet" in one_line(result)
    assert not (prepared.folder / "models" / "model").exists()
    assert not (prepared.folder / "models" / "checkpoints").exists()
    assert not (prepared.folder / "metrics" / "train.json").exists()


def test_a_run_that_diverged_before_a_validation_has_a_report(prepared):
    result = prepared.stage("train", "train.lr=1e30", "train.max_grad_norm=null",
                            "train.warmup_steps=0", "train.weight_decay=0",
                            DVC_ROOT=str(prepared.folder))  # fmt: skip
    assert "is nan at step 2" in one_line(result)
    assert json.loads(prepared.read("metrics/train.json"))["best_step"] is None
    pytest.importorskip("vl_convert")
    reported = prepared.run("python", "-m", "tools.report")
    assert reported.returncode == 0, reported.stderr
    assert "then it diverged, at step 2: there is" in prepared.read("metrics/report.html").decode()


@pytest.mark.skipif(
    not shutil.which("c++") or " " in torch.__file__, reason="torch.compile cannot work here"
)
@pytest.mark.parametrize("masked", ["false", pytest.param("true", marks=pytest.mark.soak)])
def test_a_compiled_run_is_exact_and_near_the_eager_one(prepared, masked):
    masking = f"model.intra_document_masking={masked}"
    overrides = ("train.max_steps=6", "train.dtype=bfloat16", "model.num_layers=1", masking)
    assert prepared.stage("train", *overrides).returncode == 0
    eager, runs = outputs(prepared), []
    losses = [json.loads(prepared.read("metrics/train.json"))["train_loss"]]
    for _ in range(2):
        prepared.forget_runs()
        result = prepared.stage("train", *overrides, "train.compile=true")
        assert result.returncode == 0, result.stderr
        runs.append(outputs(prepared))
    losses.append(json.loads(prepared.read("metrics/train.json"))["train_loss"])
    assert runs[0] == runs[1]
    assert runs[0] != eager  # it was compiled
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


@pytest.mark.skipif(os.cpu_count() < 2, reason="needs two threads")
def test_threads_that_are_promised_and_not_given_are_an_error(prepared):
    """oneDNN would leave half of a bfloat16 product unwritten."""
    result = prepared.run("python", "-m", "stages.train", OMP_NUM_THREADS="2", OMP_THREAD_LIMIT="1")
    assert result.returncode == 3
    assert "OpenMP promises 2 threads and gives fewer; unset OMP_DYNAMIC" in one_line(result)


def test_compiling_without_a_compiler_says_what_to_do(prepared, tmp_path):
    result = prepared.stage("train", "train.compile=true", PATH="/nonexistent")
    assert result.returncode == 3
    assert "no C++ compiler found; install g++ or set train.compile: false" in one_line(result)
    broken = tmp_path / "bin" / "g++"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho broken >&2; exit 1\n")
    broken.chmod(0o755)
    cache = str(tmp_path / "cache")
    path = f"{broken.parent}:/usr/bin:/bin"
    command = (sys.executable, "-m", "stages.train", "-S", "train.compile=true")
    result = prepared.run(*command, PATH=path, CXX=str(broken), TORCHINDUCTOR_CACHE_DIR=cache)
    assert result.returncode == 3
    assert result.stderr.count("error: torch.compile: ") == 1
    assert "or set train.compile: false" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(
    not shutil.which("c++") or " " in torch.__file__, reason="torch.compile cannot work here"
)
@pytest.mark.parametrize(
    "where",
    ["noexec", *(pytest.param(w, marks=pytest.mark.soak) for w in ("with a space", "broken"))],
)
def test_auto_does_not_compile_where_the_result_cannot_be_loaded(prepared, tmp_path, where):
    """An explicit train.compile: true ends with the cause instead."""
    folder, because, program = tmp_path / where, r"its folder must have no space \(", "g++"
    folder.mkdir()
    start = "exec"
    if where == "noexec":
        start = f"mount -t tmpfs -o noexec x {folder} && exec"
        because = r"it cannot build and load a library \(.*failed to map segment"
        if prepared.run("unshare", "-m", "sh", "-c", f"{start} true").returncode != 0:
            pytest.skip("needs the right to mount")
    if where == "broken":
        program, because = str(folder / "g++"), r"no C\+\+ compiler works; mend"
        Path(program).write_text("#!/bin/sh\necho broken >&2; exit 1\n")
        Path(program).chmod(0o755)
    command = f"{start} python -m stages.train -S train.max_steps=3000000 -S train.compile="
    unshare = ("unshare", "-m") if where == "noexec" else ()
    places = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "CXX": program}
    auto = prepared.start(*unshare, "sh", "-c", command + "auto", **places)
    for line in auto.stdout:
        if line.startswith("Plan: not compiled: "):
            assert re.match(because, line.removeprefix("Plan: not compiled: ")), line
        if line.startswith("step "):
            break
    else:
        raise AssertionError(auto.stderr.read())
    done = prepared.run(*unshare, "sh", "-c", command + "true", **places)
    assert done.returncode == 3
    *_, said = done.stderr.splitlines()  # behind what a broken compiler says itself
    assert re.match(f"error: torch.compile: {because}", said)
    assert "or set train.compile: false" in said


def test_a_model_whose_loss_is_not_finite_is_refused_and_nothing_is_written(prepared):
    prepared.prepare("train")
    file = prepared.folder / "models" / "model" / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"].fill_(3e38)
    with safe_open(file, framework="pt") as opened:
        save_file(weights, file, opened.metadata())
    result = prepared.stage("evaluate")
    assert result.returncode == 2
    assert one_line(result).startswith(
        "error: models/model/model.safetensors: weights too large: logits are not finite; "
    )
    assert not (prepared.folder / "metrics" / "eval.json").exists()


def test_evaluation_reports_the_validation_split_beside_its_baselines(prepared):
    prepared.set("train.eval_batches", 100_000)  # all of it
    prepared.prepare("train", "evaluate")
    metrics = json.loads(prepared.read("metrics/eval.json"))
    manifest = json.loads(prepared.read("data/tokens/tokens.json"))
    train, valid = (
        np.fromfile(prepared.folder / "data/tokens" / split / "text-00000.bin", "<u2").tolist()
        for split in ("train", "valid")
    )
    assert metrics["tokens"] == manifest["valid"]["tokens"] - 1 == len(valid) - 1
    during = json.loads(prepared.read("metrics/train.json"))["valid_loss"]
    assert metrics["loss_nats"] == pytest.approx(during, rel=1e-6)
    unigram, bigram = by_hand(train, valid, manifest["vocab_size"])
    baselines = metrics["baseline_loss_nats"]
    assert baselines["unigram"] == pytest.approx(unigram)
    assert baselines["bigram"] == pytest.approx(bigram)
    assert metrics["loss_nats"] < baselines["uniform"]
    summary = prepared.read("metrics/summary.md").decode()
    assert f"{metrics['loss_nats']:.4f}" in summary
    assert "models/model/" in summary
    assert prepared.read("metrics/samples.md").startswith(b"Prompt `def `, temperature 0.8:")
    assert prepared.read("metrics/loss_by_position.csv").count(b"\n") == 65
    first = {name: prepared.read(f"metrics/{name}") for name in ("eval.json", "samples.md")}
    prepared.prepare("evaluate")
    assert first == {name: prepared.read(f"metrics/{name}") for name in first}
    generated = prepared.warm("lm.generate", "--prompt", "def ", "--device", "cpu")
    assert generated["status"] == 0, generated["err"]
    assert generated["out"].startswith("def ")


def test_the_tokenizer_learns_from_the_training_split_alone(prepared):
    config = read_section(DataConfig, prepared.params, "data")
    config = replace(config, path=str(prepared.folder / "text"))
    parts = {"train": [], "valid": []}
    for split, document in split_documents(config, Counter()):
        parts[split].append(document.text)
    assert len(parts["valid"]) > 3
    expected = train_bpe(parts["train"], 300).backend.to_str(pretty=True)
    assert prepared.read("data/tokenizer/tokenizer.json").decode() == expected + "\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_an_absent_device_exits_3(prepared):
    result = prepared.stage("train", "runtime.device=cuda")
    assert result.returncode == 3
    assert "device cuda: not available" in one_line(result)


def test_replacing_bad_bytes_is_counted_aloud(prepared):
    (prepared.folder / "text" / "bad.txt").write_bytes("café".encode("latin-1"))
    result = prepared.stage("tokens", "data.encoding_errors=replace")
    assert result.returncode == 0, result.stderr
    assert "Replacement characters put in: 1\n" in result.stdout


def test_one_file_is_split_at_its_tail(project):
    lines = "".join(f"line {i} of the only file\n" for i in range(500))
    (project.folder / "only.txt").write_text(lines)
    project.set("data.path", "only.txt")
    project.set("data.split", "tail")
    project.prepare("tokenizer", "tokens", "train")
    assert json.loads(project.read("data/tokens/tokens.json"))["valid"]["documents"] == 1


def test_damaged_tokens_are_refused_by_name(prepared):
    file = prepared.folder / "data" / "tokens" / "train" / "text-00000.bin"
    data = file.read_bytes()
    for damaged, message in (
        (data[:-1], "tokens.json says"),
        (data + b"\0", "tokens.json says"),
        (data[:-1] + b"\7", "content differs from the hash in tokens.json"),
    ):
        file.write_bytes(damaged)
        result = prepared.stage("train")
        assert result.returncode == 2
        assert "data/tokens/train/text-00000.bin: " in one_line(result)
        assert message in one_line(result)


def test_another_tokenizer_than_the_tokens_is_refused(prepared):
    assert prepared.stage("tokenizer", "tokenizer.kind=bytes").returncode == 0
    result = prepared.stage("train")
    assert result.returncode == 2
    assert "data/tokens: made with another tokenizer" in one_line(result)


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_other_tokenizers_make_a_model_too(project, kind):
    if kind == "file":
        project.prepare("tokenizer")
        own = project.folder / "data" / "tokenizers" / "mine.json"
        own.write_bytes(project.read("data/tokenizer/tokenizer.json"))
        project.set("tokenizer.source", "mine.json")
    project.set("tokenizer.kind", kind)
    project.prepare("tokenizer", "tokens", "train", "evaluate")
    assert json.loads(project.read("metrics/eval.json"))["bits_per_byte"] > 0


def test_code_of_another_folder_is_refused(project):
    # as it happens when lm is installed as a package and shadows the workspace
    result = project.run("python", "-m", "stages.tokenizer", PYTHONPATH="", PYTHONSAFEPATH="1")
    assert result.returncode != 0
    safe = {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(ROOT)}
    result = project.run("python", "-m", "stages.tokenizer", **safe)
    assert result.returncode == 3
    assert f"lm comes from {ROOT / 'lm'}, not from {project.folder}" in one_line(result)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def catches(pid, number):
    """Whether a process handles a signal, from the mask of /proc/PID/status."""
    (caught,) = re.findall(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    return int(caught, 16) >> (number - 1) & 1


@pytest.mark.skipif(sys.platform != "linux", reason="a parent's death is told by Linux alone")
@pytest.mark.parametrize("batch_size", [4, 40_000], ids=["short steps", "long steps"])
def test_a_trainer_does_not_outlive_its_parent(prepared, batch_size):
    """With DVC_ROOT set, as DVC does; a step of the large batch takes far more than 30 seconds."""
    prepared.set("train.batch_size", batch_size)
    prepared.set("train.micro_batch_size", 4)
    prepared.set("train.max_steps", 100_000)
    parent = prepared.start(
        "sh", "-c", "python -m stages.train & echo $! && wait", DVC_ROOT=str(prepared.folder)
    )
    child = int(parent.stdout.readline())
    wait_for(parent, "step " if batch_size == 4 else "Model has")
    while not catches(child, signal.SIGTERM):  # from the first step on
        assert alive(child)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)
