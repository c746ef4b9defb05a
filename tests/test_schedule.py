"""Learning rates against values worked out by hand."""

from contextlib import nullcontext
from dataclasses import replace

import pytest

from lm.base.errors import InputError
from lm.base.sections import read_section
from lm.base.settings import NEED_DECAY_STEPS, TrainSection
from lm.train.schedule import (
    SCHEDULES,
    get_lr_constant_schedule,
    get_lr_cosine_schedule,
    get_lr_wsd_schedule,
    learning_rate_fraction,
)


def test_cosine_schedule_has_the_values_of_its_formula():
    got = [get_lr_cosine_schedule(it, 1.0, 0.1, 4, 12) for it in range(15)]
    cosines = [1.0, 0.92388, 0.70711, 0.38268, 0.0, -0.38268, -0.70711, -0.92388, -1.0]
    decay = [0.1 + (1 + c) / 2 * 0.9 for c in cosines]
    expected = [0.0, 0.25, 0.5, 0.75, *decay, 0.1, 0.1]
    assert got == pytest.approx(expected, abs=1e-5)


def test_cosine_schedule_without_warmup_and_without_decay():
    assert get_lr_cosine_schedule(0, 1.0, 0.1, 0, 10) == 1.0
    assert get_lr_cosine_schedule(5, 1.0, 0.1, 5, 5) == 1.0


def test_wsd_schedule_is_flat_and_then_linear():
    got = [get_lr_wsd_schedule(it, 1.0, 0.2, 2, 4, 10) for it in range(12)]
    assert got == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2])
    assert get_lr_wsd_schedule(9, 1.0, 0.2, 2, 0, 10) == 1.0


def test_constant_schedule_warms_up():
    assert [get_lr_constant_schedule(it, 2.0, 2) for it in range(4)] == [0, 1, 2, 2]
    assert get_lr_constant_schedule(0, 2.0, 0) == 2.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_update_is_lost_and_the_last_has_the_lowest_rate(train_config, name):
    config = replace(train_config, schedule=name, max_steps=10, warmup_steps=2, decay_steps=3)
    rates = [learning_rate_fraction(update, config) for update in range(1, 11)]
    assert min(rates) > 0
    assert max(rates) == 1.0
    if name == "wsd":
        expected = [0.5, 1, 1, 1, 1, 1, 1, 0.7, 0.4, 0.1]
        assert rates == pytest.approx(expected)
    assert rates[-1] == (1.0 if name == "constant" else pytest.approx(config.min_lr_ratio))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_settings_require_decay_steps_of_the_schedules_that_use_them(train_config, name):
    def rates(**changes):
        config = replace(train_config, schedule=name, max_steps=10, warmup_steps=2, **changes)
        return [learning_rate_fraction(update, config) for update in range(1, 11)]

    needed = name in NEED_DECAY_STEPS
    assert (rates(decay_steps=1) != rates(decay_steps=8)) == needed
    for impossible in (0, 9):
        with pytest.raises(InputError, match="train.decay_steps") if needed else nullcontext():
            rates(decay_steps=impossible)


def test_a_name_that_is_not_in_the_registry_is_no_setting(smoke_params):
    smoke_params["train"]["schedule"] = "sgdr"
    with pytest.raises(InputError, match="schedule = sgdr: must be one of cosine, wsd, constant$"):
        read_section(TrainSection, smoke_params, "train")
