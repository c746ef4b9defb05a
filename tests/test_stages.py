"""The stages as a user runs them: command line, interruption, resumption, bad input."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.project import ROOT, one_line

OUTPUTS = (
    "models/model/model.safetensors",
    "models/model/config.json",
    "models/model/tokenizer.json",
    "models/checkpoints/last.safetensors",
    "models/checkpoints/best.safetensors",
    "metrics/train.json",
    "metrics/curves.csv",
)


@pytest.fixture
def prepared(project):
    """A project whose tokens are made."""
    project.prepare("tokenizer", "tokens")
    return project


def outputs(project):
    return {name: project.read(name) for name in OUTPUTS}


def resume_directories(project):
    return list((project.folder / ".dvc" / "tmp" / "lm-resume").glob("*"))


def test_training_tells_what_it_does_in_order(prepared):
    result = prepared.stage("train")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.strip().split("\n")
    assert lines[0].startswith("Device: cpu (1 threads")
    assert lines[1].startswith("Loaded dataset with ")
    assert lines[1].endswith(" tokens")
    assert lines[2].startswith("Model has ")
    assert lines[2].endswith(" parameters")
    for words in ("step  5/20", "loss ", "average ", "lr ", "grad norm ", "tokens/s", "ETA "):
        assert words in lines[3]
    assert lines[5].startswith("step 10: validation loss ")
    assert lines[-1].startswith("Final loss ")
    assert "models/model" in lines[-1]
    assert not resume_directories(prepared)  # published: nothing to resume
    metrics = json.loads(prepared.read("metrics/train.json"))
    assert metrics["step"] == 20
    assert metrics["tokens"] == 20 * 4 * 64
    speed = json.loads(prepared.read("metrics/performance.json"))
    assert 0 < speed["mfu"] < 1.5
    assert speed["peak_memory_bytes"] > 1e8


def test_settings_are_overridden_from_the_command_line(prepared):
    result = prepared.stage("train", "train.lr=1e-3", "model.num_layers=1", "train.max_steps=3")
    assert result.returncode == 0, result.stderr
    config = json.loads(prepared.read("models/model/config.json"))
    assert config["num_layers"] == 1
    assert "step 3/3" in result.stdout
    assert "lr 1.00e-04" in result.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_run_goes_on_to_the_same_bytes(prepared, number, code):
    prepared.prepare("train")
    straight = outputs(prepared)
    prepared.set("train.max_steps", 2000)  # long enough to be caught
    process = prepared.start("python", "-m", "stages.train")
    while "step " not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert error.startswith("error: stopped, saved at step ")
    assert len(resume_directories(prepared)) == 1
    prepared.set("train.max_steps", 20)
    prepared.prepare("train")  # another run: must not touch the first one's state
    assert outputs(prepared) == straight
    assert len(resume_directories(prepared)) == 1


def test_a_killed_run_resumes_and_ends_in_the_same_bytes(prepared):
    prepared.set("train.max_steps", 150)
    prepared.prepare("train")
    straight = outputs(prepared)
    process = prepared.start("python", "-m", "stages.train")
    lines = []
    while not lines or not lines[-1].startswith("step  40/"):
        lines.append(process.stdout.readline())
    process.kill()
    process.communicate()
    result = prepared.stage("train")
    assert result.returncode == 0, result.stderr
    resumed = [line for line in result.stdout.split("\n") if line.startswith("Resumed at step ")]
    assert int(resumed[0].split()[-1]) >= 35  # at most one checkpoint interval is lost
    assert outputs(prepared) == straight


def test_a_damaged_newest_checkpoint_is_passed_over(prepared):
    prepared.set("train.max_steps", 150)
    prepared.prepare("train")
    straight = outputs(prepared)
    process = prepared.start("python", "-m", "stages.train")
    while not process.stdout.readline().startswith("step  40/"):
        pass
    process.kill()
    process.communicate()
    newest = max(resume_directories(prepared)[0].glob("step-*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-100])
    result = prepared.stage("train")
    assert f"warning: {os.path.relpath(newest, prepared.folder)}: " in result.stdout
    assert "going on from the checkpoint before it" in result.stdout
    assert outputs(prepared) == straight


def test_a_second_trainer_of_the_same_run_is_refused(prepared):
    prepared.set("train.max_steps", 5000)
    first = prepared.start("python", "-m", "stages.train")
    while "step " not in first.stdout.readline():
        pass
    second = prepared.stage("train")
    first.kill()
    first.communicate()
    assert second.returncode == 75
    assert f"process {first.pid} is training this run" in one_line(second)


def test_a_run_is_continued_from_a_checkpoint_with_more_steps(prepared):
    prepared.set("train.schedule", "constant")
    prepared.set("train.max_steps", 30)
    prepared.prepare("train")
    straight = prepared.read("models/model/model.safetensors"), prepared.read("metrics/curves.csv")
    prepared.set("train.max_steps", 20)
    prepared.prepare("train")
    last = "models/checkpoints/last.safetensors"
    refused = prepared.run("python", "-m", "stages.train", "--resume-from", last)
    assert refused.returncode == 2
    assert "is at step 20, train.max_steps = 20; nothing is left to do" in one_line(refused)
    more = ("--resume-from", last, "-S", "train.max_steps=30")
    result = prepared.run("python", "-m", "stages.train", *more)
    assert result.returncode == 0, result.stderr
    assert "Continuing models/checkpoints/last.safetensors from step 20" in result.stdout
    assert straight == (
        prepared.read("models/model/model.safetensors"),
        prepared.read("metrics/curves.csv"),
    )
    other = (*more, "-S", "model.num_layers=1")
    refused = prepared.run("python", "-m", "stages.train", *other)
    assert refused.returncode == 2
    assert "model.num_layers = 2 there, 1 here" in one_line(refused)


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


def test_divergence_exits_4_and_publishes_nothing(prepared):
    result = prepared.stage("train", "train.lr=1e30", "train.max_grad_norm=null",
                            "train.warmup_steps=0", "train.weight_decay=0")  # fmt: skip
    assert result.returncode == 4
    assert "is nan at step" in one_line(result)
    assert not (prepared.folder / "models" / "model").exists()


def test_a_compiled_run_is_exact_and_near_the_eager_one(prepared):
    overrides = ("train.compile=true", "train.max_steps=6", "train.dtype=bfloat16")
    eager = prepared.stage("train", *overrides[1:])
    losses = [json.loads(prepared.read("metrics/train.json"))["train_loss"]]
    runs = []
    for _ in range(2):
        result = prepared.stage("train", *overrides)
        assert result.returncode == 0, result.stderr
        runs.append(outputs(prepared))
        losses.append(json.loads(prepared.read("metrics/train.json"))["train_loss"])
    assert eager.returncode == 0
    assert runs[0] == runs[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


def test_compiling_without_a_compiler_says_what_to_do(prepared):
    command = [sys.executable, "-m", "stages.train", "-S", "train.compile=true"]
    result = prepared.run(*command, PATH="/nonexistent")
    assert result.returncode == 3
    assert "no C++ compiler found; install g++ or set train.compile: false" in one_line(result)


def test_evaluation_beats_nothing_it_did_not_learn_and_reports_it(prepared):
    prepared.prepare("train", "evaluate")
    metrics = json.loads(prepared.read("metrics/eval.json"))
    tokens = json.loads(prepared.read("data/tokens/tokens.json"))["valid"]
    assert metrics["tokens"] == tokens["tokens"] - 1
    assert metrics["baseline_loss_nats"]["bigram"] < metrics["baseline_loss_nats"]["unigram"]
    assert metrics["baseline_loss_nats"]["unigram"] < metrics["baseline_loss_nats"]["uniform"]
    assert metrics["loss_nats"] < metrics["baseline_loss_nats"]["uniform"]
    summary = prepared.read("metrics/summary.md").decode()
    assert f"{metrics['loss_nats']:.4f}" in summary
    assert "models/model/" in summary
    assert prepared.read("metrics/samples.md").startswith(b"Prompt `def `:")
    assert prepared.read("metrics/loss_by_position.csv").count(b"\n") == 65
    first = {name: prepared.read(f"metrics/{name}") for name in ("eval.json", "samples.md")}
    prepared.prepare("evaluate")
    assert first == {name: prepared.read(f"metrics/{name}") for name in first}
    generated = prepared.run("python", "-m", "lm.generate", "--prompt", "def ", "--device", "cpu")
    assert generated.returncode == 0, generated.stderr
    assert generated.stdout.startswith("def ")


BAD = [
    ("tokenizer", ["data.path=missing"], 2, "data.path = missing: no such file or folder"),
    ("train", ["train.lrr=1"], 2, "unknown key train.lrr (did you mean train.lr?)"),
    ("train", ["train.lr=.nan"], 2, "params.yaml: train.lr = nan: must be finite"),
    ("train", ["model.num_heads=3"], 2, "model.d_model = 32 is not divisible by model.num_heads"),
    ("train", ["model.context_length=100000"], 2, "valid split has "),
    ("train", ["runtime.device=tpu"], 2, "must be one of auto, cpu, cuda, mps"),
    ("corpus", ["data.packages=[networkx==1.0]"], 3, "networkx==1.0 wanted, 3.6.1 installed"),
    ("evaluate", [], 2, "models/model/config.json: no such file"),
    ("tokens", ["data.path=text/*.txt"], 2, "a pattern goes into data.glob"),
    ("tokens", ["data.path=models"], 2, "no file matches data.glob"),
    ("tokens", ["data.valid_fraction=0.0001"], 2, "the valid split has no documents"),
]


def test_bad_input_is_one_line_an_exit_code_and_no_loss(prepared):
    made = ["data/tokenizer/tokenizer.json", "data/tokens/train.bin", "data/tokens/tokens.json"]
    before = [prepared.read(name) for name in made]
    for stage, overrides, code, message in BAD:
        result = prepared.stage(stage, *overrides)
        assert result.returncode == code, (stage, overrides, result.stderr)
        assert message in one_line(result)
        kept = made[:1] if stage == "tokens" else made  # a stage may drop its own old output
        assert [prepared.read(name) for name in kept] == before[: len(kept)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_an_absent_device_exits_3(prepared):
    result = prepared.stage("train", "runtime.device=cuda")
    assert result.returncode == 3
    assert "device cuda: not available" in one_line(result)


def test_damaged_tokens_are_refused_by_name(prepared):
    file = prepared.folder / "data" / "tokens" / "train.bin"
    file.write_bytes(file.read_bytes()[:-1])
    result = prepared.stage("train")
    assert result.returncode == 2
    assert "data/tokens/train.bin: " in one_line(result)
    assert "tokens.json says" in one_line(result)


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


def test_a_trainer_does_not_outlive_its_parent(prepared):
    prepared.set("train.max_steps", 100_000)
    parent = prepared.start(
        "sh", "-c", "python -m stages.train & echo $! && wait", DVC_ROOT=str(prepared.folder)
    )
    child = int(parent.stdout.readline())
    while "step " not in parent.stdout.readline():
        pass
    parent.kill()
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the trainer went on for 5 s")
