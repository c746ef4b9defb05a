"""Learning-rate schedules: pure functions of the update number, chosen by name."""

import math

from lm.base.settings import ScheduleConfig


def get_lr_cosine_schedule(
    it: int,
    max_learning_rate: float,
    min_learning_rate: float,
    warmup_iters: int,
    cosine_cycle_iters: int,
) -> float:
    """Warm up linearly from 0, follow a cosine to the minimum at `cosine_cycle_iters`, then flat.

    Loshchilov and Hutter 2017 (SGDR), eq. 5, without restarts.
    """
    if it < warmup_iters:
        return it / warmup_iters * max_learning_rate
    if it > cosine_cycle_iters:
        return min_learning_rate
    if cosine_cycle_iters == warmup_iters:
        return max_learning_rate
    progress = (it - warmup_iters) / (cosine_cycle_iters - warmup_iters)
    span = max_learning_rate - min_learning_rate
    return min_learning_rate + (1 + math.cos(math.pi * progress)) / 2 * span


def get_lr_wsd_schedule(
    it: int,
    max_learning_rate: float,
    min_learning_rate: float,
    warmup_iters: int,
    decay_iters: int,
    total_iters: int,
) -> float:
    """Warm up, stay, decay linearly over the last `decay_iters`: WSD (Hu et al. 2024, sec. 4)."""
    if it < warmup_iters:
        return it / warmup_iters * max_learning_rate
    if it >= total_iters:
        return min_learning_rate
    remaining = min(1.0, (total_iters - it) / decay_iters) if decay_iters else 1.0
    return min_learning_rate + remaining * (max_learning_rate - min_learning_rate)


def get_lr_constant_schedule(it: int, max_learning_rate: float, warmup_iters: int) -> float:
    """Warm up, then stay at the maximum."""
    return min(1.0, it / warmup_iters) * max_learning_rate if warmup_iters else max_learning_rate


SCHEDULES = {  # the settings read its keys, and know which use decay_steps: NEED_DECAY_STEPS
    "cosine": lambda it, config: get_lr_cosine_schedule(
        it, 1.0, config.min_lr_ratio, config.warmup_steps, config.max_steps
    ),
    "wsd": lambda it, config: get_lr_wsd_schedule(
        it, 1.0, config.min_lr_ratio, config.warmup_steps, config.decay_steps, config.max_steps
    ),
    "constant": lambda it, config: get_lr_constant_schedule(it, 1.0, config.warmup_steps),
}


def learning_rate_fraction(update: int, config: ScheduleConfig) -> float:
    """Return the share of the peak rate; updates count from 1, so that none has a rate of 0."""
    return SCHEDULES[config.schedule](update, config)
