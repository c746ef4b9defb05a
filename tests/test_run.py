"""The life of a run: what it counts and keeps when steps are skipped and when it is stopped."""

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lm.config import RuntimeConfig, read_section
from lm.errors import Diverged
from lm.run import Run
from lm.tokenizer import byte_tokenizer
from lm.tokens import Split
from lm.train import new_state, train
from tests.test_train import poisoned

SPLIT = Split("train", (np.arange(3000) * 7919 % 256).astype(np.uint16), 0)
MADE_OF = {"inputs": {}, "code": {}, "environment": {}}


@pytest.fixture
def settings(smoke_params, model_config, train_config):
    runtime = read_section(RuntimeConfig, smoke_params, "runtime")
    model = replace(model_config, vocab_size=256)
    config = replace(train_config, max_steps=12, eval_interval=6, on_nonfinite="skip")
    return model, config, replace(runtime, checkpoint_interval=4)


def go(settings, folder, bad_steps, until=12):
    """A run in which the gradients of some steps are spoilt, up to a step; then it publishes."""
    model, config, runtime = settings
    state = new_state(model, config, torch.device("cpu"))
    for step in bad_steps:
        poisoned(state, step)
    with Run(state, config, runtime, MADE_OF, folder / "unfinished") as run:
        steps = train(state, SPLIT, config)
        while not run.finished():
            record = next(steps)
            if record["step"] % config.eval_interval == 0:
                record["valid_loss"] = 1.0
            run.log(record)
            if run.save_due:
                run.save()
            if record["step"] == until < config.max_steps:
                return None
        run.publish(byte_tokenizer(), folder / "models", folder / "metrics")
    return json.loads((folder / "metrics" / "train.json").read_text())


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


def test_the_bound_on_skipped_steps_holds_across_a_stop(settings, tmp_path):
    model, config, runtime = settings
    settings = model, replace(config, max_skipped_steps=3), replace(runtime, checkpoint_interval=1)
    bad = [4, 5, 6, 7]
    assert go(settings, tmp_path, bad, until=5) is None
    with pytest.raises(Diverged, match=r"at step 7; .*3 steps before .* last good .*: step 6"):
        go(settings, tmp_path, bad)
    assert not (tmp_path / "models").exists()
