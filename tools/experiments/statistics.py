"""Is a difference between settings larger than the noise between seeds?

Each setting was run with some seeds, and each run gave a loss. The setting with the lowest mean is
the best, and every other one is compared with it:

- Pairwise over the seeds that both have (paired t test, Student 1908), if more than half of the
  smaller setting's seeds are shared, at least two. The same seed means the same initial weights and
  the same batches, whose effect on both settings cancels. The rule does not look at the losses.
- Else by Welch's t test, which does not assume equal variances (large learning rates scatter more):
  Welch 1947, degrees of freedom after Satterthwaite 1946.
- With Bonferroni's correction over all k (k - 1) / 2 pairs of settings (Dunn 1961, "Multiple
  Comparisons Among Means"), since the best was picked from the same losses: all intervals together
  hold with a confidence of 95 %. Of nine equal settings with five seeds, something "worse" is found
  in 50 % of sweeps without a correction, in 10 % with one for the 8 comparisons made, in 3 % with
  this one (benchmarks/seeds.py). Holm's step-down test finds a little more, but has no interval
  that agrees with each verdict.
- A difference is shown if its interval leaves out zero.

The best was picked for its low mean, so that mean is too low on average (the winner's curse); only
seeds that took no part in the choice show the true one. The t tests assume that seed noise is about
normal.
"""

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student
from scipy.stats import ttest_1samp, ttest_ind

CONFIDENCE = 0.95  # of all intervals together
POWER = 0.8  # of the number of seeds that is advised
MAX_SEEDS = 200

Losses = Mapping[int, float]  # by seed


@dataclass(frozen=True)
class Difference:
    """The mean loss of a setting minus that of the best one, and its confidence interval."""

    mean: float
    low: float
    high: float
    variances: tuple[float, ...]  # of the paired differences, or (Welch) of both settings
    comparisons: int

    @property
    def paired(self) -> bool:
        """Return whether the same seeds are compared with each other."""
        return len(self.variances) == 1

    @property
    def margin(self) -> float:
        """Return half the interval: the smallest difference that these seeds could show."""
        return (self.high - self.low) / 2

    @property
    def shown(self) -> bool:
        """Return whether seed noise does not explain the difference."""
        return self.low > 0 or self.high < 0

    @property
    def seeds_needed(self) -> int | None:
        """Return the number of seeds of each that would show a true difference of this size.

        None stands for more than MAX_SEEDS. With n seeds of each, Satterthwaite's degrees of
        freedom are (n - 1) (sum of variances)^2 / (sum of their squares).
        """
        seeds, total = np.arange(2, MAX_SEEDS + 1), sum(self.variances)
        squares = sum(variance**2 for variance in self.variances)
        freedom = (seeds - 1) * (total**2 / squares if squares else 1)
        tail = (1 - CONFIDENCE) / 2 / self.comparisons
        quantiles = student.isf(tail, freedom) + student.isf(1 - POWER, freedom)
        enough = seeds[quantiles * np.sqrt(total / seeds) < abs(self.mean)]
        return int(enough[0]) if len(enough) else None


@dataclass
class ComparedSetting:
    """A setting and its results."""

    setting: dict[str, Any]
    losses: dict[int, float]  # by seed
    difference: Difference | None = None
    is_best: bool = False

    @property
    def mean(self) -> float:
        """Return the mean over its seeds."""
        return statistics.fmean(self.losses.values())


def compare(settings: Sequence[Losses]) -> tuple[int | None, list[Difference | None]]:
    """Return the position of the best setting and each one's difference to it.

    A setting with one seed shows no noise, so it is never the best and has no difference. The best
    has none either. The position is None if no setting has two seeds.
    """
    several = [i for i, losses in enumerate(settings) if len(losses) > 1]
    if not several:
        return None, [None] * len(settings)
    best = min(several, key=lambda i: statistics.fmean(settings[i].values()))
    comparisons = max(math.comb(len(several), 2), 1)
    return best, [
        difference(losses, settings[best], comparisons) if i in several and i != best else None
        for i, losses in enumerate(settings)
    ]


def difference(ours: Losses, best: Losses, comparisons: int = 1) -> Difference:
    """Return the difference of two settings; correct its interval for several comparisons."""
    shared = sorted(ours.keys() & best.keys())
    samples = [[*ours.values()], [*best.values()]]
    if len(shared) > 1 and 2 * len(shared) > min(len(ours), len(best)):
        samples = [[ours[seed] - best[seed] for seed in shared]]
    low, high = t_interval(1 - (1 - CONFIDENCE) / comparisons, *samples)
    means = [statistics.fmean(sample) for sample in samples]
    variances = tuple(statistics.variance(sample) for sample in samples)
    return Difference(means[0] - sum(means[1:]), low, high, variances, comparisons)


def t_interval(confidence: float, *samples: Sequence[float]) -> tuple[float, float]:
    """Return the interval of a mean (Student), or of the difference of two means (Welch)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # seeds may agree to the last digit
        if len(samples) == 1:
            result = ttest_1samp(*samples, 0)
        else:
            result = ttest_ind(*samples, equal_var=False)
        low, high = result.confidence_interval(confidence)
    return float(low), float(high)
