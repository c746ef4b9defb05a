"""Steps launched before the host has read the last ones: the same bits, and the same guarantees.

A GPU runs ahead by itself; here a CPU is told to, which changes nothing but who waits for whom.
"""

import math
import signal
from dataclasses import replace

import pytest
import torch

from lm.base.errors import Diverged, Interrupted
from lm.data.splits import Splits
from lm.runs.run import Run
from lm.train.ahead import AHEAD
from lm.train.loop import fit, train
from lm.train.state import new_state
from tests.test_run import MADE_OF
from tests.test_run import settings as settings
from tests.test_train import CPU, SPLIT, poisoned, run, weights


def trained(model_config, config, runs_ahead, bad_steps=()):
    """Train; return the state, the records without times, and how far the state was ahead."""
    state = new_state(model_config, config, CPU)
    state.runs_ahead = runs_ahead
    for step in bad_steps:
        poisoned(state, step)
    records, lead = [], []
    for record in train(state, SPLIT, config, pause=lambda step: step % 7 == 0):
        records.append({key: value for key, value in record.items() if not key.endswith("_s")})
        lead.append(state.step - record["step"])
    return state, records, lead


def same(one, other):
    """Compare two states to the bit, and the records by their text, since nan is not nan."""
    (a, records_a, _), (b, records_b, _) = one, other
    assert repr(records_a) == repr(records_b)
    assert all(torch.equal(tensor, weights(b)[key]) for key, tensor in weights(a).items())
    of_a, of_b = (s.optimizer.state_dict()["state"] for s in (a, b))
    for number, entries in of_a.items():
        assert all(torch.equal(value, of_b[number][name]) for name, value in entries.items())
    for name in ("step", "skipped_steps", "skipped_in_a_row"):
        assert getattr(a, name) == getattr(b, name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("bad_steps", [(), (2,), (3, 4, 5, 7, 8, 20)])
def test_running_ahead_gives_the_same_bits_and_skips_the_same_steps(
    model_config, train_config, optimizer, bad_steps
):
    config = replace(train_config, optimizer=optimizer, on_nonfinite="skip")
    waiting = trained(model_config, config, False, bad_steps)
    ahead = trained(model_config, config, True, bad_steps)
    same(ahead, waiting)
    assert waiting[2] == [0] * 20
    assert max(ahead[2]) == AHEAD - 1
    assert ahead[2][6] == ahead[2][13] == ahead[2][19] == 0  # where it pauses, and at the end


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_divergence_found_late_leaves_the_state_before_the_bad_step(
    model_config, train_config, value
):
    before, _ = run(model_config, train_config, steps=4)
    state = new_state(model_config, train_config, CPU)
    state.runs_ahead = True
    poisoned(state, 5, value)
    with pytest.raises(Diverged, match="gradient norm is .* at step 5"):
        list(train(state, SPLIT, train_config, pause=lambda step: False))
    assert state.step == 4
    assert all(torch.equal(tensor, weights(before)[key]) for key, tensor in weights(state).items())


def test_a_caller_without_pauses_gets_each_step_alone(model_config, train_config):
    state = new_state(model_config, train_config, CPU)
    state.runs_ahead = True
    assert all(state.step == record["step"] for record in train(state, SPLIT, train_config))


def fitted(settings, folder, runs_ahead, at_step=None, happens=None):
    """Train; return the state and the logbook. Something may happen once, while a step computes."""
    model, config, runtime = settings
    config = replace(config, eval_interval=5, max_steps=12)
    state = new_state(model, config, CPU)
    state.runs_ahead, due = runs_ahead, [at_step]

    def forward(*_):
        if state.step == due[0]:
            due.clear()
            due.append(None)
            happens()

    with Run(state, config, replace(runtime, checkpoint_interval=50), MADE_OF, folder) as this:
        state.model.layers[0].register_forward_pre_hook(forward)
        fit(state, Splits(SPLIT, SPLIT, 256), config, this)
        return state, this.logbook


def run_out_of_memory():
    raise MemoryError


def test_out_of_memory_while_ahead_is_recorded_at_the_step_that_ran_out(settings, tmp_path):
    logbooks = [
        fitted(settings, tmp_path / name, ahead, 7, run_out_of_memory)[1]
        for name, ahead in (("a", False), ("b", True))
    ]
    assert logbooks[1].changes["micro_batch_sizes"] == {"1": 4, "8": 2}
    assert logbooks[0].changes == logbooks[1].changes
    assert logbooks[0].history.rows == logbooks[1].history.rows


def test_a_signal_while_ahead_saves_what_is_launched_and_goes_on_to_the_same_bits(
    settings,
    tmp_path,
):
    straight, logbook = fitted(settings, tmp_path / "a", False)
    with pytest.raises(Interrupted, match=r"saved at step \d; run again"):
        fitted(settings, tmp_path / "b", True, 6, lambda: signal.raise_signal(signal.SIGTERM))
    *_, saved = sorted((tmp_path / "b").glob("*/step-*.json"))
    assert saved.stem in {"step-00000007", "step-00000008", "step-00000009"}
    resumed, of_resumed = fitted(settings, tmp_path / "b", True)
    assert of_resumed.history.rows == logbook.history.rows
    assert all(
        torch.equal(tensor, weights(straight)[key]) for key, tensor in weights(resumed).items()
    )
