"""Evaluation against a plain loop over the split."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lm.base.errors import InputError
from lm.data.splits import Split
from lm.evaluate.metrics import METRICS, bits_per_byte, calibration, loss_by_position
from lm.model.transformer import TransformerLM
from lm.model.validation import evaluate

TOKENS = np.random.default_rng(1).integers(0, 96, 203)
SPLIT = Split("valid", TOKENS.astype(np.uint16), 0)
LENGTHS = np.arange(96) % 5


def by_hand(model, stride):
    """(target index, position, nats) of every target, window by window, one at a time."""
    length, n = 16, len(TOKENS)
    done, start, rows = 0, 0, []
    while done < n - 1:
        start = min(start, n - 1 - length)
        x = torch.tensor(TOKENS[start : start + length])[None]
        log_probabilities = torch.log_softmax(model(x)[0].double(), -1)
        for t in range(length):
            if start + t >= done:
                nats = -log_probabilities[t, TOKENS[start + t + 1]].item()
                rows.append((start + t + 1, t, nats))
        done, start = start + length, start + stride
    return rows


@pytest.mark.parametrize("stride", [None, 1, 5, 16])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_sums_equal_a_plain_loop(model, stride, batch_size):
    rows = by_hand(model, stride or 16)
    assert sorted(target for target, _, _ in rows) == list(range(1, 203))
    sums = evaluate(model, SPLIT, batch_size, LENGTHS, stride=stride)
    metrics = {name: metric(sums) for name, metric in METRICS.items()}
    nats = sum(row[2] for row in rows)
    n_bytes = int(LENGTHS[TOKENS[1:]].sum())
    assert metrics["tokens"] == 202
    assert metrics["bytes"] == n_bytes
    assert metrics["loss_nats"] == pytest.approx(nats / 202, rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(nats / 202), rel=1e-5)
    assert metrics["bits_per_byte"] == pytest.approx(nats / n_bytes / math.log(2), rel=1e-6)
    for max_rows, width in ((16, 1), (5, 4)):
        curve = loss_by_position(sums, max_rows)
        assert [position for position, _ in curve] == list(range(0, 16, width))
        for position, loss in curve:
            losses = [row[2] for row in rows if position <= row[1] < position + width]
            assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("stride", [16, 5])
def test_calibration_equals_a_plain_loop(model, stride):
    """Guo et al. 2017, eq. 3, token by token; logits are scaled so that all bins are met."""
    with torch.no_grad():
        model.lm_head.weight *= 6
    bins = [[] for _ in range(15)]
    for target, t, _ in by_hand(model, stride):
        start = target - 1 - t
        x = torch.tensor(TOKENS[start : start + 16])[None]
        p = torch.softmax(model(x)[0, t].double(), -1)
        confidence = p.max().item()
        (place,) = [m for m in range(15) if m / 15 < confidence <= (m + 1) / 15]
        bins[place].append((confidence, p.argmax().item() == TOKENS[target]))
    assert sum(map(bool, bins)) > 6
    error, right, rows = 0.0, 0, []
    for place, found in enumerate(bins):
        if found:
            confidence, accuracy = (sum(column) / len(found) for column in zip(*found, strict=True))
            error += len(found) / 202 * abs(accuracy - confidence)
            right += sum(hit for _, hit in found)
            rows.append((place / 15, (place + 1) / 15, len(found), confidence, accuracy))
    sums = evaluate(model, SPLIT, 7, stride=stride)
    assert METRICS["calibration_error"](sums) == pytest.approx(error, rel=1e-5)
    assert METRICS["accuracy"](sums) == pytest.approx(right / 202)
    for row, expected in zip(calibration(sums), rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


def test_more_context_lowers_no_count_and_changes_the_loss(model):
    full, sliding = (evaluate(model, SPLIT, 8, LENGTHS, stride=stride) for stride in (16, 4))
    assert full.counts.sum() == sliding.counts.sum() == 202
    assert sliding.counts[:12].sum() == 12  # the first window alone has targets there


def test_some_batches_are_spread_over_the_split(model):
    sums = evaluate(model, SPLIT, 2, max_batches=3)
    assert sums.counts.sum() == 6 * 16
    assert sums.n_bytes == 0
    taken = [i * 13 // 6 for i in range(6)]  # of 13 windows
    rows = [nats for target, _, nats in by_hand(model, 16) if (target - 1) // 16 in taken]
    assert sums.nats.sum() == pytest.approx(sum(rows), rel=1e-6)


@pytest.mark.parametrize("stride", [16, 5])
def test_a_masked_model_is_evaluated_with_its_mask(model, model_config, stride):
    masked = TransformerLM(replace(model_config, intra_document_masking=True))
    masked.load_state_dict(model.state_dict())
    split = Split("valid", TOKENS.astype(np.uint16), 0, end_id=int(TOKENS[20]))
    sums = evaluate(masked, split, 8, stride=stride)

    def by_document(x):
        ends = [i + 1 for i in range(16) if x[0, i] == split.end_id]
        return torch.cat([model(part[None]) for part in x[0].tensor_split(ends) if len(part)], 1)

    nats = sum(row[2] for row in by_hand(by_document, stride))
    assert sums.nats.sum() == pytest.approx(nats, rel=1e-6)
    assert sums.nats.sum() != pytest.approx(evaluate(model, split, 8, stride=stride).nats.sum())
    with pytest.raises(InputError, match="no id is known to end a document"):
        evaluate(masked, SPLIT, 8)


def test_evaluation_disturbs_nothing(model):
    model.train()
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    evaluate(model, SPLIT, 8)
    assert model.training
    assert torch.equal(torch.rand(3), expected)


def test_a_split_shorter_than_a_window_is_refused(model):
    short = Split("valid", TOKENS[:16], 0)
    with pytest.raises(InputError, match=r"valid split has 16 tokens, but .*\+ 1 = 17"):
        evaluate(model, short, 8)
    assert evaluate(model, Split("valid", TOKENS[:17], 0), 8).counts.sum() == 16


def test_bits_per_byte_of_nothing_is_refused(model):
    with pytest.raises(ValueError, match="no text"):
        bits_per_byte(evaluate(model, SPLIT, 8))
