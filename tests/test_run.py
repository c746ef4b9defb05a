"""The life of a run: what it counts and keeps when steps are skipped and when it is stopped."""

import csv
import io
import json
import math
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lm.base.errors import Diverged, InputError
from lm.base.migrations import ADDED
from lm.base.params import load_params
from lm.base.sections import read_section
from lm.base.settings import RuntimeConfig, TrainConfig
from lm.data.splits import Split, Splits
from lm.data.tokenizer import byte_tokenizer
from lm.model.transformer import ModelConfig
from lm.runs.checkpoint import read_extra
from lm.runs.pace import Pace
from lm.runs.publish import publishing
from lm.runs.run import Run
from lm.runs.saved_run import Best
from lm.train.loop import fit, train, validation_loss
from lm.train.state import new_state
from tests.project import SMOKE
from tests.test_checkpoint import drop, put, rewritten, say, spoilt
from tests.test_train import poisoned

SPLIT = Split("train", (np.arange(3000) * 7919 % 256).astype(np.uint16), 0, end_id=7)
MADE_OF = {"inputs": {}, "code": {}, "environment": {}}


@pytest.fixture
def settings(smoke_params, model_config, train_config):
    runtime = read_section(RuntimeConfig, smoke_params, "runtime")
    model = replace(model_config, vocab_size=256)
    config = replace(train_config, max_steps=12, eval_interval=6, on_nonfinite="skip")
    return model, config, replace(runtime, checkpoint_interval=4)


def go(settings, folder, bad_steps=(), until=12, losses=(1.0, 1.0), resume_from=None, live=None):
    """A run in which the gradients of some steps are spoilt, up to a step; then it publishes.

    `losses`: what its two validations say.
    """
    model, config, runtime = settings
    state = new_state(model, config, torch.device("cpu"))
    for step in bad_steps:
        poisoned(state, step)
    with Run(state, config, runtime, MADE_OF, folder / "runs", resume_from, live) as run:
        steps = train(state, SPLIT, config)
        while not run.finished:
            record = next(steps)
            if record["step"] % config.eval_interval == 0:
                record["valid_loss"] = losses[record["step"] // config.eval_interval - 1]
            run.log(record)
            if run.save_due:
                run.save()
            if record["step"] == until < config.max_steps:
                return None
        run.publish(byte_tokenizer(), folder / "models", folder / "metrics")
    return json.loads((folder / "metrics" / "train.json").read_text())


def test_fit_validates_where_due_saves_and_trains_a_finished_run_no_further(settings, tmp_path):
    model, config, runtime = settings
    config = replace(config, max_steps=8, eval_interval=3, eval_batches=2)

    def fitted():
        state = new_state(model, config, torch.device("cpu"))
        with Run(state, config, runtime, MADE_OF, tmp_path) as run:
            fit(state, Splits(SPLIT, SPLIT, 256), config, run)
            return state, run.logbook.history.rows

    (state, rows), (_, again) = fitted(), fitted()
    losses = {row["step"]: row["valid_loss"] for row in rows if row["valid_loss"] is not None}
    assert list(losses) == [3, 6, 8]
    with torch.no_grad():
        assert losses[8] == pytest.approx(validation_loss(state, SPLIT, config))
        assert losses[8] == pytest.approx(rows[-1]["train_loss"], abs=0.5)
    assert again == rows
    assert len(list(tmp_path.glob("*/step-00000008.json"))) == 1


def test_skipped_steps_are_counted_told_and_resumed(settings, tmp_path, capsys):
    bad = [3, 5, 6, 10]
    straight = go(settings, tmp_path / "a", bad)
    assert straight["skipped_steps"] == 4
    told = capsys.readouterr().out
    assert told.count("warning: step ") == 4
    assert "warning: step 5 skipped: gradient norm is nan at step 5; " in told
    assert go(settings, tmp_path / "b", bad, until=7) is None
    assert go(settings, tmp_path / "b", bad) == straight
    assert "Resumed at step 6" in capsys.readouterr().out
    for name in ("model/model.safetensors", "checkpoints/last.safetensors"):
        a, b = (tmp_path / folder / "models" / name for folder in "ab")
        assert a.read_bytes() == b.read_bytes()
    rows = list(csv.DictReader(io.StringIO((tmp_path / "a/metrics/curves.csv").read_text())))
    assert [int(row["step"]) for row in rows if row["train_loss"] == "nan"] == bad
    weights = load_file(tmp_path / "a/models/checkpoints/last.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_the_loss_scale_of_float16_is_resumed_too(settings, tmp_path, capsys):
    model, config, runtime = settings
    settings = model, replace(config, dtype="float16"), runtime
    go(settings, tmp_path / "a")
    assert go(settings, tmp_path / "b", until=7) is None
    go(settings, tmp_path / "b")
    assert "Resumed at step 6" in capsys.readouterr().out
    a, b = (tmp_path / folder / "models/checkpoints/last.safetensors" for folder in "ab")
    assert read_extra(a)["scaler"]["_growth_tracker"] == 12  # steps since the scale was changed
    assert a.read_bytes() == b.read_bytes()


def test_a_continued_run_takes_the_settings_of_now(settings, tmp_path):
    model, config, runtime = settings
    go(settings, tmp_path)
    last = tmp_path / "models" / "checkpoints" / "last.safetensors"
    changed = replace(config, max_steps=14, weight_decay=0.5, beta2=0.5, lr=1e-4,
                      schedule="constant", dtype="float16")  # fmt: skip
    go((model, changed, runtime), tmp_path, resume_from=last)
    with safe_open(last, framework="pt") as file:
        header = json.loads(file.metadata()["checkpoint"])
    groups = header["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == [1e-4, 1e-4]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert [group["betas"] for group in groups] == [[0.9, 0.5]] * 2


@pytest.mark.parametrize(
    ("of_model", "of_train"),
    [({"intra_document_masking": True}, {}), ({}, {"sampling": "documents"})],
    ids=["model", "train"],
)
def test_another_dealing_or_masking_is_another_run(settings, tmp_path, capsys, of_model, of_train):
    model, config, runtime = settings
    assert go(settings, tmp_path, until=7) is None
    other = replace(model, **of_model), replace(config, **of_train), runtime
    assert go(other, tmp_path, until=7) is None
    assert "Resumed" not in capsys.readouterr().out
    assert go(settings, tmp_path) is not None
    assert "Resumed at step 6" in capsys.readouterr().out


def test_the_bound_on_skipped_steps_holds_across_a_stop(settings, tmp_path):
    model, config, runtime = settings
    settings = model, replace(config, max_skipped_steps=3), replace(runtime, checkpoint_interval=1)
    bad = [4, 5, 6, 7]
    assert go(settings, tmp_path, bad, until=5) is None
    with pytest.raises(
        Diverged, match=r"at step 7; .*skipping 3 steps in a row .* last good .*: step 6"
    ):
        go(settings, tmp_path, bad)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("what", ["gradients", "validation"])
def test_a_run_that_diverges_keeps_its_curves_up_to_there(settings, tmp_path, monkeypatch, what):
    model, config, runtime = settings
    settings = model, replace(config, on_nonfinite="stop"), replace(runtime, checkpoint_interval=4)
    monkeypatch.chdir(tmp_path)
    bad, losses, step = ([7], (1.0, 1.0), 7) if what == "gradients" else ([], (1.0, math.nan), 12)
    for live, found in (
        (None, r"lm-clock/\w+.csv"),
        (Path("metrics"), "metrics/curves.csv"),
    ):
        with pytest.raises(Diverged, match=f"nan at step {step}; .*; curves up to there: {found}$"):
            go(settings, Path(), bad, losses=losses, live=live)
    (clock,) = Path("lm-clock").iterdir()
    for file in (clock, Path("metrics/curves.csv")):
        rows = list(csv.DictReader(io.StringIO(file.read_text())))
        assert [int(row["step"]) for row in rows] == list(
            range(1, 7 if what == "gradients" else 13)
        )
    figures = json.loads(Path("metrics/train.json").read_text())
    assert figures["diverged_at_step"] == step
    assert figures["valid_loss"] == (1.0 if what == "gradients" else None)


@pytest.mark.parametrize(
    ("losses", "early_stopping", "told"),
    [((4.85, 5.92), None, True), ((4.85, 4.87), None, False), ((4.85, 5.92), 9, False)],
)
def test_a_run_that_ends_worse_than_it_was_says_so(
    settings, tmp_path, capsys, losses, early_stopping, told
):
    model, config, runtime = settings
    settings = model, replace(config, early_stopping=early_stopping), runtime
    go(settings, tmp_path, losses=losses)
    line = (
        "warning: best validation was step 6 (4.8500), published step 12 (5.9200): "
        "set train.early_stopping"
    )
    last = capsys.readouterr().out.splitlines()[-1]
    assert (last == line) is told
    assert last.startswith("Final loss ") is not told


def test_a_continued_run_takes_the_best_of_the_run_it_continues_and_no_other(settings, tmp_path):
    model, config, runtime = settings
    folders = [tmp_path / name for name in ("mine", "other")]
    for seed, folder in enumerate(folders):
        changed = replace(config, seed=seed, early_stopping=3)
        go((model, changed, runtime), folder, losses=(1.0, 2.0))  # the best is step 6
    mine, other = (folder / "models" / "checkpoints" for folder in folders)
    last, best = mine / "last.safetensors", (mine / "best.safetensors").read_bytes()
    longer = replace(config, seed=0, early_stopping=3, max_steps=13)

    def continue_run():
        state = new_state(model, longer, torch.device("cpu"))
        with Run(state, longer, runtime, MADE_OF, tmp_path / "runs", last) as run:
            return run.logbook.best, (run.folder.checkpoint(6)).read_bytes()

    assert continue_run() == (Best(valid_loss=1.0, step=6, misses=0), best)
    for name in (
        "best.safetensors",
        "best.json",
    ):  # as a kill while another run publishes leaves it
        shutil.copy(other / name, mine / name)
    message = "last.safetensors: its best checkpoint, of step 6, is not beside it"
    with pytest.raises(InputError, match=message):
        continue_run()
    (mine / "best.safetensors").unlink()
    with pytest.raises(InputError, match=message):
        continue_run()


def test_two_runs_publish_one_after_the_other(settings, tmp_path):
    runs_root, seen = tmp_path / "runs", []
    runs_root.mkdir()
    held = threading.Event()

    def publish_another():
        with publishing(runs_root):
            held.set()
            end = time.monotonic() + 300
            while not list(runs_root.glob("*/step-00000012.json")):  # the run is at its end
                assert time.monotonic() < end
                time.sleep(0.01)
            time.sleep(0.5)
            seen.append((tmp_path / "models").exists())

    other = threading.Thread(target=publish_another)
    other.start()
    held.wait()
    go(settings, tmp_path)
    other.join()
    assert seen == [False]
    assert (tmp_path / "models" / "model" / "provenance.json").exists()


@pytest.mark.parametrize(
    ("forward_s", "step_s", "said"),
    [
        ([0.1, 0.1, 0.3], 0.4, "  rank 2 is slow: 3.0 times the others' forward pass"),
        ([0.2, 0.1, 0.1], 0.3, "  rank 0 is slow: 2.0 times the others' forward pass"),
        ([0.1, 0.1, 0.14], 0.1, ""),  # less than half as long again
        ([0.1, 0.1, 0.3], 0.9, ""),  # less than a quarter of a step
        ([0.3], 0.3, ""),  # nobody to compare with
    ],
)
def test_a_rank_that_holds_the_others_up_is_named_after_twenty_steps(forward_s, step_s, said):
    pace = Pace()
    for step in range(20):
        assert pace.slow_rank() == ""
        hiccup = 9.0 if step == 7 else 0.0  # of one step: medians do not see it
        pace.add({"step_s": step_s}, [forward_s[0] + hiccup, *forward_s[1:]])
    assert pace.slow_rank() == said


ROW = "extra/history/rows/0"
IMPOSSIBLE = [
    (drop("optimizer.2."), "another optimizer: no state of parameter 2"),
    (put("model.lm_head.weight", spoilt(float("nan"))), "lm_head.weight: 1 of 8192 values are not"),
    (say("optimizer/param_groups/0/lr", "x"), "another optimizer: group 0: lr = 'x', expected"),
    (say("iteration", -12), "header.iteration = -12: must be >= 0"),
    (say("iteration", 5), "its history is not of 5 steps"),
    (say("extra", {}), "not saved by stage train"),
    (say("extra/identity", []), "not saved by stage train"),
    (say("extra/identity/inputs", None), "missing key extra.identity.inputs"),
    (say("extra/identity/train", 3), "identity.train = 3 is a number, wanted keys and values"),
    (say("extra/identity/micro_batch_sizes", {}), "micro_batch_sizes = {}: must not be empty"),
    (say("extra/identity/micro_batch_sizes", {"x": 4}), "must have steps as its keys"),
    (say("extra/identity/micro_batch_sizes/1", "4"), "micro_batch_sizes.1 = '4' is text, wanted"),
    (say("extra/scaler", {"scale": 1.0}), "missing key extra.scaler.growth_factor"),
    (say("extra/history", []), "extra.history = [] is a list, wanted keys and values"),
    (say("extra/history", None), "missing key extra.history"),
    (say("extra/history/rows", []), "its history is not of 6 steps"),
    (say("extra/history/interval", 2), "its history is not of 6 steps"),
    (say("extra/history/_sum", "much"), "extra.history._sum = 'much' is text, wanted a number"),
    (say(f"{ROW}/train_loss", "low"), "rows[0].train_loss = 'low' is text, wanted a number"),
    (say(f"{ROW}/train_loss", float("nan")), "rows[0].train_loss = nan: must be finite"),
    (say(f"{ROW}/step", 3), "its history is not of 6 steps"),
    (say("extra/best", 1.0), "extra.best = 1.0 is a decimal, wanted keys and values"),
    (say("extra/best/step", 7), "not one of its 6 steps"),
    (say("extra/best/step", 4), "not one of its 6 steps"),
    (say("extra/best/step", "6"), "extra.best.step = '6' is text, wanted an integer"),
    (say("extra/best/valid_loss", float("nan")), "extra.best.valid_loss = nan: must be finite"),
    (say("extra/best/misses", -1), "extra.best.misses = -1: must be >= 0"),
    (say("extra/valid_loss", "low"), "extra.valid_loss = 'low' is text, wanted a number"),
    (say("extra/weights", ["hash"]), "extra.weights = ['hash'] is a list, wanted keys and values"),
    (say("extra/weights/6", 3), "extra.weights.6 = 3 is a number, wanted text"),
    (say("extra/skipped", 3), "extra.skipped = 3 is a number, wanted a list"),
    (say("extra/skipped", [1]), "extra.skipped = [1]: must be two numbers"),
    (say("extra/skipped", [1, 2]), "extra.skipped = [1, 2]: more than its 6 steps"),
    (say("extra/skipped", [9, 0]), "extra.skipped = [9, 0]: more than its 6 steps"),
]  # fmt: skip


@pytest.fixture(scope="module")
def stopped(made_once):
    """A run that was stopped after its checkpoint of step 6: to be copied."""

    def make(folder):
        params = load_params(SMOKE, ["train.compile=false"])
        params["model"] |= {"vocab_size": 256, "context_length": 16}
        params["train"] |= {"max_steps": 12, "eval_interval": 6}
        params["runtime"]["checkpoint_interval"] = 4
        sections = ((ModelConfig, "model"), (TrainConfig, "train"), (RuntimeConfig, "runtime"))
        settings = tuple(read_section(kind, params, name) for kind, name in sections)
        go(settings, folder, until=7)
        return folder, settings

    return made_once("stopped", make)


@pytest.mark.parametrize(("change", "message"), IMPOSSIBLE, ids=[m for _, m in IMPOSSIBLE])
def test_an_impossible_checkpoint_is_passed_over_and_not_continued(
    stopped, tmp_path, capsys, change, message
):
    (made, settings), folder = stopped, tmp_path / "run"
    shutil.copytree(made / "runs", folder / "runs")
    (newest,) = folder.glob("runs/*/step-00000006.safetensors")
    rewritten(newest, change)
    with pytest.raises(InputError) as caught:
        go(settings, tmp_path / "other", resume_from=newest)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "other" / "models").exists()
    capsys.readouterr()
    assert go(settings, folder, until=8) is None
    told = capsys.readouterr().out
    assert message in told
    assert "; skipped\nResumed at step 4\n" in told


def test_a_checkpoint_from_before_there_were_some_settings_is_continued(stopped, tmp_path, capsys):
    (made, settings), folder = stopped, tmp_path / "run"
    shutil.copytree(made / "runs", folder / "runs")
    (newest,) = folder.glob("runs/*/step-00000006.safetensors")
    for section, added in ADDED.items():
        for key, value in added.items():
            if getattr(settings[section == "train"], key) == value:
                rewritten(newest, say(f"extra/identity/{section}/{key}", None))
    assert "reduction" not in read_extra(newest)["identity"]["train"]
    assert "intra_document_masking" not in read_extra(newest)["identity"]["model"]
    assert go(settings, tmp_path / "other", until=8, resume_from=newest) is None
    assert f"Continuing {newest} from step 6" in capsys.readouterr().out
    rewritten(newest, say("extra/identity/model/num_layers", None))  # was always there
    with pytest.raises(InputError, match=r"made with another model.num_layers = None there"):
        go(settings, tmp_path / "third", resume_from=newest)


def test_a_checkpoint_under_another_steps_name_is_passed_over(stopped, tmp_path, capsys):
    made, settings = stopped
    shutil.copytree(made / "runs", tmp_path / "runs")
    (newest,) = tmp_path.glob("runs/*/step-00000006.safetensors")
    for file in (newest, newest.with_suffix(".json")):
        file.rename(file.with_stem("step-00000011"))
    go(settings, tmp_path, until=8)
    told = capsys.readouterr().out
    assert "step-00000011.safetensors: is at step 6: not the step in its name" in told
    assert "Resumed at step 4" in told
