"""The acceptance run on a GPU, tried on a CPU: each part finds what it should, and it ends."""

import json
import sys

import pytest
import torch

from benchmarks.gpu.__main__ import GOALS, ITSELF, is_wrong, main, markdown
from benchmarks.gpu.equality import CASES
from benchmarks.gpu.parts import PARTS

CPU = torch.device("cpu")


@pytest.fixture
def as_before():
    yield
    torch.set_deterministic_debug_mode("default")
    torch.set_num_threads(1)


@pytest.fixture
def found(as_before, monkeypatch, tmp_path):
    """A part's figures by name, from models of no size; nanoGPT is not there."""
    monkeypatch.setenv("NANOGPT", str(tmp_path))

    def run(part):
        figures = {}
        PARTS[part].run(CPU, True, lambda name, **numbers: figures.update({name: numbers}))
        return figures

    return run


def test_products_and_copies_have_rates(found):
    first, *others = found("machine").values()
    assert first["torch"] == torch.__version__
    assert len(others) == 4 + 6 + 1
    assert all(min(rates.values()) > 0 for rates in others)


def test_a_stopped_run_is_compared_with_a_straight_one_and_a_step_is_not_finite(found):
    figures = found("equality")
    assert [name for name in CASES if name in figures] == ["fsdp, Muon"]
    assert [figure["equal"] for figure in figures.values()] == [True] * 3
    assert "loss is nan at step 3" in figures["a step not finite, muon"]["says"]


def test_losses_are_compared_with_those_of_float32_on_a_cpu(found):
    figures = found("curve")
    assert figures["float32"]["apart_at_most"] == 0
    assert 0 < figures["bfloat16"]["apart_at_most"] < 0.1
    assert all(figure["close"] for figure in figures.values())


def test_contestants_take_turns_and_one_that_is_missing_is_left_out(found):
    figures = found("17M")
    assert "model.py is missing; set NANOGPT" in figures["nanoGPT"]["left_out"]
    ours = figures["ours"]
    assert ours["tokens_per_s"] == pytest.approx(2 * 16 / ours["ms"] * 1e3)
    assert ours["minutes"] > 327_680_000 / ours["tokens_per_s"] / 60
    assert ours["kernels"] > 100 > len(ours["longest"])


def test_a_preset_is_trained_by_plan_and_its_memory_is_compared(found):
    (figures,) = found("preset").values()
    assert figures["steps"] == 6
    assert figures["micro_batch"] == figures["micro_batch_planned"] == 8
    assert figures["peak_of_plan"] > 0


def test_text_is_generated_a_row_or_several_at_a_time(found):
    figures = found("decode")
    for dtype in ("float32", "bfloat16"):
        assert figures[f"{dtype}, batch 1, temperature 0"]["tokens_per_s"] > 0
        assert figures[f"evaluate, {dtype}"]["tokens_per_s"] > 0


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The command with some arguments: how it exits, and the figures it has written."""

    def run(*arguments):
        command = ["gpu", "--device", "cpu", "--out", str(tmp_path), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        said = None
        try:
            main()
        except SystemExit as exited:
            said = exited.code
        return said, json.loads((tmp_path / "gpu.json").read_text())

    return run


def test_a_part_is_a_process_whose_figures_are_kept(run, tmp_path):
    said, figures = run("--tiny", "--parts", "machine")
    assert said is None
    assert figures[0]["torch"] == torch.__version__
    assert [figure["name"] for figure in figures].index(ITSELF) == len(figures) - 1 == 12
    assert "| copy |" in (tmp_path / "gpu.md").read_text()
    assert (tmp_path / "machine.log").exists()


def test_a_part_that_outlasts_the_budget_is_stopped(run):
    said, figures = run("--tiny", "--budget", "6", "--parts", "machine")
    assert said == f"failed or not equal: machine: {ITSELF}"
    assert figures == [{"part": "machine", "name": ITSELF, "failed": "stopped after 1 s"}]


def test_a_part_that_the_budget_leaves_no_time_for_is_named(run):
    said, figures = run("--budget", "20", "--parts", "preset", "decode")
    assert said is None
    assert [f["left_out"] for f in figures] == [
        f"15 s left, {needed} s needed" for needed in (50, 20)
    ]


def test_goals_stand_beside_figures():
    figures = [
        {"part": "124M", "name": "nanoGPT", "ms": 60.0},
        {"part": "124M", "name": "ours", "ms": 50.0, "mfu": 0.4},
        {"part": "equality", "name": "dropout", "equal": False},
        {"part": "curve", "name": ITSELF, "failed": "it said a | b"},
        {"part": "17M", "name": "nanoGPT", "left_out": "missing"},
    ]
    lines = markdown(figures, 3.0).splitlines()
    assert "| 124M, tokens/s over nanoGPT's | at least 1.15 | 1.2 | reached |" in lines
    assert "| 124M, MFU | at least 0.5 | 0.4 | missed |" in lines
    assert sum(line.endswith("| not measured |") for line in lines) == len(GOALS) - 2
    assert f"| {ITSELF} | it said a / b |" in lines
    assert [is_wrong(figure) for figure in figures] == [False, False, True, True, False]
