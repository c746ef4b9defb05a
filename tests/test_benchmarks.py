"""The contestants of the benchmarks: they learn, are counted rightly, and none is left over."""

import math
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np
import psutil
import pytest
import torch

from benchmarks import textbook
from benchmarks.contestants import CONTESTANTS, PARALLEL, SHAPES, Missing, products
from benchmarks.parallel import Way, measure_saving, started, table
from benchmarks.race import Curve, Point, report, validation_loss
from benchmarks.scaling import scaled
from benchmarks.worker import Worker
from lm.model.kernels import cross_entropy
from lm.model.transformer import TransformerLM
from lm.train.optim import AdamW, gradient_clipping
from tests.kill import gone
from tests.project import ROOT

TINY = SHAPES["XS"]
ELSEWHERE = "compiled", "floor", *PARALLEL  # the last join a group, which is for a process's life
EAGER = [name for name in CONTESTANTS if not any(word in name for word in ELSEWHERE)]


@pytest.fixture
def repeating(tmp_path):
    """A file of token ids that is learnt quickly."""
    file = tmp_path / "tokens.bin"
    (np.arange(1000) % 5).astype(np.uint16).tofile(file)
    return file


@pytest.fixture
def nondeterministic_again():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", EAGER)
def test_a_contestant_starts_at_the_uniform_loss_and_learns(
    name, repeating, nondeterministic_again
):
    try:
        contest = CONTESTANTS[name](TINY, repeating, torch.device("cpu"))
    except Missing as missing:
        pytest.skip(str(missing))
    losses = list(islice(contest.steps, 40))
    # logits that start with a variance of one add half a nat
    assert math.log(TINY.vocab_size) - 0.5 < losses[0] < math.log(TINY.vocab_size) + 1.0
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] - 0.5


@pytest.fixture
def both(model_config):
    """Ours and the one by the book, with the same weights."""
    config = replace(model_config, num_heads=4, num_kv_heads=None, d_ff=80)
    torch.manual_seed(3)
    ours = TransformerLM(config)
    for name, parameter in ours.named_parameters():
        if "ln" in name:  # ones would hide a forgotten weight
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    theirs = textbook.Transformer(
        config.vocab_size, config.d_model, config.num_layers, config.num_heads, config.d_ff,
        config.context_length, config.rope_theta, config.norm_eps,
    )  # fmt: skip
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_the_model_equals_the_one_by_the_book(both):
    ours, theirs = both
    ids = torch.randint(96, (3, 16))
    torch.testing.assert_close(ours(ids), theirs(ids), atol=1e-4, rtol=1e-4)


def test_training_equals_training_by_the_book(both):
    ours, theirs = both
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizers = (
        AdamW(ours.parameters(), **settings),
        textbook.AdamW(theirs.parameters(), **settings),
    )
    clip = (
        partial(gradient_clipping, max_l2_norm=0.5),
        partial(textbook.clip_gradients, max_norm=0.5),
    )
    losses = ours.loss, lambda x, y: textbook.cross_entropy(theirs(x), y)
    for step in range(5):
        ids = torch.randint(96, (2, 17), generator=torch.Generator().manual_seed(step))
        nats = []
        for model, optimizer, clipped, loss_of in zip(both, optimizers, clip, losses, strict=True):
            optimizer.zero_grad()
            loss = loss_of(ids[:, :-1], ids[:, 1:])
            loss.backward()
            clipped(list(model.parameters()))
            optimizer.step()
            nats.append(loss.item())
        assert nats[0] == pytest.approx(nats[1], abs=5e-6)


@pytest.mark.parametrize("name", ["XS", "M"])
def test_a_floor_multiplies_as_much_as_the_model_says(name, repeating, nondeterministic_again):
    shape, device = SHAPES[name], torch.device("cpu")
    ours = CONTESTANTS["ours, float32"](shape, repeating, device)
    norms = 6 * shape.d_model * (2 * shape.num_layers + 1)  # counted as weights, multiply nothing
    attention = 12 * shape.num_layers * shape.d_model * shape.context_length
    in_one = sum(6 * n * k * m for b, n, k, m in products(shape) if b == 1) / shape.tokens
    assert in_one == ours.flops_per_token - attention - norms
    floor = CONTESTANTS["floor, bfloat16"](shape, repeating, device)
    assert floor.flops_per_token == ours.flops_per_token - norms
    assert len(list(islice(floor.steps, 2))) == 2


def test_validation_counts_every_window_once(both):
    ours, _ = both
    ids = np.random.default_rng(0).integers(96, size=16 * 130 + 5)
    windows = torch.from_numpy(ids[: 16 * 130 + 1])
    x, y = windows[:-1].view(-1, 16), windows[1:].view(-1, 16)
    expected = cross_entropy(ours(x), y).item()
    assert validation_loss(lambda x, y: ours(x), ids, 16) == pytest.approx(expected, abs=1e-5)


def test_a_race_is_told_by_steps_and_by_time():
    theirs = Curve(5.0, [Point(10.0, 100, 2.0), Point(20.0, 200, 1.5)])
    ours = Curve(9.0, [Point(8.0, 100, 1.6), Point(12.0, 150, 1.4), Point(18.0, 200, 1.2)])
    table = report(theirs, ours)
    assert "| 100 | 10.0 | 2.0000 | 8.0 | 1.6000 |" in table
    assert "| ours after as long | 1.2000 (step 200) | 1.4000 (step 150) |" in table
    assert "| ours is below it (step 150) after | 60% | 84% |" in table
    assert "never below" in report(ours, theirs)


def test_scaling_keeps_the_proportions_of_a_model():
    wide = scaled(SHAPES["M"], "d_model", 2)
    assert (wide.d_model, wide.num_heads, wide.d_ff) == (256, 8, 688)
    assert scaled(SHAPES["M"], "batch_size", 0.5) == SHAPES["M"]._replace(batch_size=6)


def test_processes_that_train_one_model_share_the_batch_of_one(repeating):
    together = {"parallel": "ddp", "reduction": "tree", "micro_batch_size": 1}
    ways = {"none": Way(), "ddp": Way(2, 1, together)}

    def worker(name, place):
        way = ways[name]
        return Worker("ours, float32", TINY, repeating, "cpu", 1, place, **way.settings)

    with started(ways, worker) as (teams, said):
        assert [len(team) for team in teams.values()] == [1, 2]
        assert said["ddp"]["first_loss"] == pytest.approx(said["none"]["first_loss"], abs=1e-5)
        first, second = teams["ddp"]
        first.request(steps=3)
        ready, _, _ = select.select([first.process.stdout], [], [], 0.5)
        assert not ready  # alone it gets nowhere
        assert len(second.run(3)) == len(first.answer()["seconds"]) == 3


def test_a_speed_is_compared_with_the_first_row_and_with_another_in_the_same_round():
    ways = {"none": Way(), "two": Way(2), "tree": Way(2, beside="two")}
    taken = {"none": [0.1, 0.2, 0.4], "two": [0.05, 0.1, 0.1], "tree": [0.1, 0.1, 0.2]}
    rows = table("XS", TINY, ways, taken).splitlines()[3:]
    assert rows == [
        "| none | 200.0 | 160 | 1.00 (1.00-1.00) |  |  |",
        "| two | 100.0 | 320 | 2.00 (2.00-4.00) |  |  |",
        "| tree | 100.0 | 320 | 2.00 (1.00-2.00) | 0.50 (0.50-1.00) | two |",
    ]


@pytest.mark.soak  # thirty processes
def test_two_processes_save_as_much_as_one():
    ways = {"fsdp": Way(2, 1, {"parallel": "fsdp"})}
    size, plain, found = measure_saving(TINY, ways, None, rounds=1)
    parameters = 2 * 64 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    assert parameters * 12 < size < parameters * 12 * 1.2  # weights, two moments, headers
    assert len(plain) == 1
    (times,) = found["fsdp"]
    assert min(*times["alone_s"], times["wait_s"], times["held_s"]) > 0


def throughput(*arguments, **environment):
    command = [sys.executable, "-m", "benchmarks.throughput", "--shapes", "XS", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, text=True
    )


def test_the_failure_of_one_is_a_line_and_the_rest_goes_on(tmp_path):
    names = ["nanoGPT", "ours, float32", "floor, float32"]
    few = "--rounds", "1", "--steps", "1"
    process = throughput(*few, "--contestants", *names, NANOGPT=str(tmp_path))
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert f"nanoGPT: {tmp_path}/model.py is missing; set NANOGPT" in out
    assert [line.split(" | ")[0] for line in out.splitlines() if line.startswith("| ")] == [
        f"| XS {tuple(TINY)}", "| ours, float32", "| floor, float32",
    ]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_contestant_outlives_a_benchmark_that_is_killed(number):
    process = throughput("--rounds", "1000000", "--contestants", "floor, float32")
    watched, deadline = psutil.Process(process.pid), time.monotonic() + 300
    while not (children := watched.children()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=300)
    assert gone(children)
