"""The walk-through: its numbers, checked by hand, and that it runs again to the same words."""

import inspect
import math
import re
import time
from collections import Counter

import pytest

from lm import demo

# the words of docs/TOUR.md for a step, and the call that does it
STEP = {
    "schedule": "get_lr_cosine_schedule(",
    "batch": "get_batch(",
    "forward": "model(x)",
    "loss": "cross_entropy(",
    "backward": "loss.backward()",
    "clip": "gradient_clipping(",
    "step": "optimizer.step()",
}


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """Where the walk is started, and where its temporary folder lies."""
    (tmp_path / "work").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(demo.tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path


@pytest.mark.soak
def test_the_walk_trains_within_a_minute_and_leaves_nothing_behind(empty_folder, capsys):
    start = time.process_time()
    demo.main([])
    assert time.process_time() - start < 60
    out = capsys.readouterr().out
    assert not [*(empty_folder / "work").iterdir(), *empty_folder.rglob("*.safetensors")]
    assert "Model has 393,856 parameters" in out
    rows = {name: list(map(float, cells)) for name, *cells in re.findall(
        r"^   (uniform|unigram|bigram|this|entropy).*?  +([\d.]+) +([\d.]+) +([\d.]+)$", out, re.M
    )}  # fmt: skip
    assert set(rows) == {"uniform", "unigram", "bigram", "this", "entropy"}
    losses = [rows[n][0] for n in ("entropy", "this", "bigram", "unigram", "uniform")]
    assert losses == sorted(losses)
    assert rows["this"][0] < rows["bigram"][0] / 2
    for nats, perplexity, bits in rows.values():
        assert perplexity == pytest.approx(math.exp(nats), abs=0.006)
        assert bits == pytest.approx(nats / math.log(2), abs=2e-4)
    training, held_out = demo.dataset()
    counts = Counter(training.tobytes())
    targets = demo.encode(held_out).tobytes()[1:]
    by_hand = sum(math.log((len(training) + 256) / (counts[byte] + 1)) for byte in targets)
    assert rows["unigram"][0] == pytest.approx(by_hand / len(targets), abs=6e-5)


def test_the_same_words_again_but_for_the_times(empty_folder, monkeypatch, capsys):
    monkeypatch.setattr(demo, "STEPS", 12)
    monkeypatch.setattr(demo, "WARMUP", 2)
    outputs = []
    for _ in range(2):
        demo.main([])
        outputs.append(re.sub(r" in [\d.]+ s$", "", capsys.readouterr().out, flags=re.M))
    assert outputs[0] == outputs[1]
    resumed = re.findall(r"^   step +(\d+)/12 ", outputs[0].partition("Checkpoint")[2], re.M)
    assert list(map(int, resumed)) == [8, 10, 12]  # after the checkpoint of step 6
    straight, resumed = re.findall(r"\b([0-9a-f]{16})\.\.\.", outputs[0])
    assert straight == resumed


def test_the_loop_of_the_walk_is_the_readmes_in_its_order():
    source = inspect.getsource(demo.train)
    places = [source.index(call) for call in STEP.values()]
    assert places == sorted(places)
    assert ", ".join(STEP) in inspect.getsource(demo.train_and_resume)
