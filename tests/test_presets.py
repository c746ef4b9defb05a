"""Every preset is a whole params.yaml once written out, can be planned and starts."""

import dataclasses
import math
import re
import subprocess

import numpy as np
import pytest
import torch

from lm import demo
from lm.base.errors import InputError
from lm.base.params import load_params
from lm.base.sections import read_section
from lm.base.settings import EvaluateConfig, TrainSection
from lm.data.splits import Split
from lm.data.tokenizer import TokenizerConfig, byte_tokenizer
from lm.model.transformer import ModelConfig, TransformerLM
from lm.plan.__main__ import main
from lm.plan.page import table
from lm.plan.plan import make_plan
from lm.prepare.documents import cut_into_shards
from lm.prepare.sources import DataConfig
from lm.train.loop import train
from lm.train.state import new_state
from tests.project import ROOT
from tools.preset import main as write_preset
from tools.preset import whole

PRESETS = sorted((ROOT / "presets").glob("*.yaml"))
DEFAULT = ROOT / "presets" / "default.yaml"
# by hand: embedding and head, layers x (attention + feed-forward), norms (and of queries and keys)
SIZES = {
    "default": 2 * 2048 * 128 + 4 * (4 * 128**2 + 3 * 128 * 344) + 9 * 128,
    "gpt2-124m": 50257 * 768 + 12 * (4 * 768**2 + 3 * 768 * 2048) + 25 * 768,
    "grammar": 2 * 1024 * 128 + 3 * (4 * 128**2 + 3 * 128 * 344) + 7 * 128,
    "seed-small": 2 * 256 * 128 + 2 * (4 * 128**2 + 3 * 128 * 256) + 5 * 128,
    "shakespeare-char": 2 * 256 * 128 + 4 * (4 * 128**2 + 3 * 128 * 344) + 9 * 128 + 8 * 32,
    "smoke": 2 * 512 * 32 + 2 * (4 * 32**2 + 3 * 32 * 64) + 5 * 32,
    "tinystories-17m": 2 * 10_000 * 512 + 4 * (4 * 512**2 + 3 * 512 * 1344) + 9 * 512,
}
TOKENS = {"gpt2-124m": 10e9, "tinystories-17m": 327_680_000}  # in all, as they say themselves


def settings(preset):
    """Its sections, checked, as the stages read them: data, model, train."""
    params = load_params(preset)
    tokenizer = read_section(TokenizerConfig, params, "tokenizer", str(preset))
    read_section(EvaluateConfig, params, "evaluate", str(preset))
    vocab_size = byte_tokenizer().vocab_size if tokenizer.kind == "bytes" else tokenizer.vocab_size
    model = read_section(ModelConfig, params, "model", str(preset), vocab_size=vocab_size)
    data = read_section(DataConfig, params, "data", str(preset))
    return data, model, read_section(TrainSection, params, "train", str(preset))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.stem)
def test_a_preset_has_the_size_it_says_is_planned_and_starts(preset):
    _, model, config = settings(preset)
    with torch.device("meta"):
        assert TransformerLM(model).num_parameters() == SIZES[preset.stem]
    planned = make_plan(model, config, torch.device("cpu"))
    page = table(planned, step_s=1.0, price=None)
    assert f"| all | {SIZES[preset.stem]:,} |" in page
    said = "".join(line for line in preset.read_text().split("\n") if line.startswith("#"))
    if f"--params presets/{preset.name}" in said:
        assert f"{planned.flops:.1e}".replace("e+", "e") in said
    tokens = config.max_steps * config.batch_size * model.context_length
    assert tokens == pytest.approx(TOKENS.get(preset.stem, tokens), rel=1e-4)
    if SIZES[preset.stem] > 2_000_000:
        return
    short = {"max_steps": 2, "warmup_steps": 0, "schedule": "constant", "compile": False}
    config = dataclasses.replace(planned.config, **short)
    state = new_state(model, config, torch.device("cpu"))
    ids = np.arange(4 * model.context_length) % 251
    first, second = train(state, Split("train", ids, 0, end_id=255), config)
    # logits that start with a variance of one add half a nat
    assert first["train_loss"] == pytest.approx(math.log(model.vocab_size), abs=0.7)
    assert second["train_loss"] < first["train_loss"]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.stem)
def test_a_preset_is_written_out_as_a_complete_file(preset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "presets").symlink_to(ROOT / "presets")
    (tmp_path / "params.yaml").write_text(whole(ROOT / "presets" / "smoke.yaml"))
    write_preset([preset.stem])  # over another one, of which nothing is left
    assert load_params(tmp_path / "params.yaml") == load_params(preset)
    assert f"params.yaml now has the settings of presets/{preset.name}\n" == capsys.readouterr().out
    text = (tmp_path / "params.yaml").read_text()
    assert text.splitlines()[0] == preset.read_text().splitlines()[0]
    names = re.compile(r"^\n?\w+:$|^  \w+:", re.M)
    assert names.findall(text) == names.findall(DEFAULT.read_text())


def test_the_default_preset_is_a_copy_of_the_committed_settings():
    """Presets lie over the copy: params.yaml itself may hold what someone is trying out."""
    committed, copy = (
        subprocess.run(["git", "show", f"HEAD:{file}"], cwd=ROOT, capture_output=True).stdout
        for file in ("params.yaml", "presets/default.yaml")
    )
    assert committed == copy, "`python -m tools.settings` makes the settings the default preset"


def test_a_preset_that_cannot_be_laid_over_says_why(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: default.yaml\ntrain:\n  lr: 1.0\n")
    with pytest.raises(
        InputError, match=r"mine.yaml: extends .*default.yaml, which does not exist"
    ):
        load_params(mine)
    (tmp_path / "default.yaml").write_text(DEFAULT.read_text())
    assert load_params(mine, ["train.eps=2.0"])["train"]["eps"] == 2
    assert load_params(mine)["train"] == load_params(DEFAULT)["train"] | {"lr": 1.0}
    mine.write_text("extends: default.yaml\ntrain:\n  lrr: 1.0\n")
    with pytest.raises(InputError, match=r"mine.yaml: unknown key train.lrr \(did you mean train"):
        load_params(mine)
    mine.write_text("extends: default.yaml\ntrian:\n  lr: 1.0\n")
    with pytest.raises(InputError, match=r"mine.yaml: unknown section trian \(did you mean train"):
        load_params(mine)
    mine.write_text("extends: default.yaml\n\ntrain: {lr: 1.0}\n")
    with pytest.raises(InputError, match=r"mine.yaml: write one key a line"):
        whole(mine)
    (tmp_path / "default.yaml").write_text("extends: mine.yaml\n")
    with pytest.raises(InputError, match="unknown section extends"):
        load_params(mine)


def test_the_small_preset_is_the_model_of_the_walk():
    _, model, _ = settings(ROOT / "presets" / "seed-small.yaml")
    assert dataclasses.replace(model, context_length=demo.CONTEXT) == demo.MODEL


@pytest.mark.parametrize("name", ["tinystories-17m", "gpt2-124m"])
def test_a_preset_for_text_that_is_not_here_says_where_it_goes(name, tmp_path, monkeypatch):
    preset = ROOT / "presets" / f"{name}.yaml"
    data, _, _ = settings(preset)
    assert f"Put the text into {data.path} first" in " ".join(preset.read_text().split("\n# "))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rf"data.path = {data.path}: no such file"):
        cut_into_shards(data)


def test_a_preset_is_planned_as_it_stands_whatever_tokens_are_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "tokens").mkdir(parents=True)
    (tmp_path / "data" / "tokens" / "tokens.json").write_text('{"vocab_size": 300}')
    small = ["-S", "train.batch_size=4", "-S", "train.num_threads=1"]
    main(["--params", str(ROOT / "presets" / "smoke.yaml"), *small])
    assert f"| all | {SIZES['smoke']:,} |" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["--params", "no.yaml"])
    assert stopped.value.code == 2
    assert "no.yaml: no such file" in capsys.readouterr().err


def test_a_long_step_is_reckoned_from_a_part_of_its_windows(monkeypatch):
    """A step whose windows would take a minute at the nominal rates."""
    from lm.plan import timing

    _, model, config = settings(ROOT / "presets" / "smoke.yaml")
    seconds = {}
    for batch_size in (64, 20_000):
        config = dataclasses.replace(config, batch_size=batch_size, compile=False)
        planned = make_plan(model, config, torch.device("cpu"))
        monkeypatch.setattr(timing, "CALIBRATION_S", 0.05)
        seconds[batch_size] = timing.calibrate(planned)
    ratio = seconds[20_000] / seconds[64]  # other programs may slow one of them down
    assert 20_000 / 64 / 4 < ratio < 20_000 / 64 * 4  # as measured, not reckoned, some 3
