"""Is a difference between settings larger than the noise between seeds?

A setting was run with some seeds, each gave a loss; lower is better. The setting with the lowest
mean is the best, and every other one is compared with it:

- Over the seeds that both have, pairwise (paired t test, Student 1908): the same seed means the
  same initial weights and the same batches, and what these do to both settings cancels. n pairs,
  n - 1 degrees of freedom. Pairs are used if more than half of the smaller setting's seeds are
  shared, at least two: a rule that does not look at the losses.
- Else by Welch's t test, which does not assume equal variances (large learning rates scatter more):
  Welch 1947, degrees of freedom after Satterthwaite 1946.
- The best was picked from the same losses, so each of the k (k - 1) / 2 pairs of settings could
  have come to be looked at: Bonferroni's correction over all of them (Dunn 1961, "Multiple
  Comparisons Among Means"). All intervals together hold with a confidence of 95 %, whatever depends
  on whatever. Of nine equal settings with five seeds, something "worse" is found in 50 % of sweeps
  without a correction, in 10 % with one for the 8 comparisons made, in 3 % with this one
  (benchmarks/seeds.py). Holm's step-down test finds a little more, but has no interval that agrees
  with each verdict.
- A difference is shown if its interval leaves out zero: verdict and interval are one thing.

The mean of the best, picked because it is low, is too low on average (the winner's curse); seeds
that took no part in the choice tell its true mean. The t tests take seed noise to be about normal.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from scipy.stats import t as student

CONFIDENCE = 0.95  # of all intervals together
POWER = 0.8  # of the number of seeds that is advised
MAX_SEEDS = 200

Losses = Mapping[int, float]  # by seed


@dataclass(frozen=True)
class Difference:
    """The mean loss of a setting minus that of the best one, and how sure that is."""

    mean: float
    variances: tuple[float, ...]  # of the paired differences, or (Welch) of both settings
    counts: tuple[int, ...]  # of pairs, or of the seeds of both
    comparisons: int

    @property
    def paired(self) -> bool:
        """Whether the same seeds are compared with each other."""
        return len(self.counts) == 1

    @property
    def margin(self) -> float:
        """Half the confidence interval: the smallest difference that these seeds could show."""
        error, freedom = _standard_errors(np.array(self.variances), np.array([self.counts]).T)
        return float((student.isf(self._tail, freedom) * error)[0])

    @property
    def low(self) -> float:
        """The lower end of the confidence interval."""
        return self.mean - self.margin

    @property
    def high(self) -> float:
        """The upper end of the confidence interval."""
        return self.mean + self.margin

    @property
    def shown(self) -> bool:
        """Whether the difference is larger than the seed noise explains."""
        return abs(self.mean) > self.margin

    @property
    def seeds_needed(self) -> int | None:
        """How many seeds of each would show a true difference of this size; None: very many."""
        seeds = np.arange(2, MAX_SEEDS + 1)
        counts = np.tile(seeds, (len(self.variances), 1))
        errors, freedom = _standard_errors(np.array(self.variances), counts)
        quantiles = student.isf(self._tail, freedom) + student.isf(1 - POWER, freedom)
        enough = seeds[quantiles * errors < abs(self.mean)]
        return int(enough[0]) if len(enough) else None

    @property
    def _tail(self) -> float:
        return (1 - CONFIDENCE) / 2 / self.comparisons


@dataclass
class Row:
    """A setting, and what it gave."""

    setting: dict[str, Any]
    losses: dict[int, float]  # by seed
    difference: Difference | None = None
    is_best: bool = False

    @property
    def mean(self) -> float:
        """The mean over its seeds."""
        return statistics.fmean(self.losses.values())


def compare(settings: Sequence[Losses]) -> tuple[int | None, list[Difference | None]]:
    """The position of the best setting and each one's difference to it.

    A setting with one seed says nothing of its noise: it is never the best and has no difference.
    Nor has the best itself; it is None if no setting has two seeds.
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
    """The difference of two settings, with an interval that allows for so many comparisons."""
    shared = sorted(ours.keys() & best.keys())
    paired = len(shared) > 1 and 2 * len(shared) > min(len(ours), len(best))
    if paired:
        samples = [[ours[seed] - best[seed] for seed in shared]]
    else:
        samples = [list(ours.values()), list(best.values())]
    means = [statistics.fmean(sample) for sample in samples]
    return Difference(
        mean=means[0] - sum(means[1:]),
        variances=tuple(statistics.variance(sample) for sample in samples),
        counts=tuple(len(sample) for sample in samples),
        comparisons=comparisons,
    )


def _standard_errors(
    variances: Float64[np.ndarray, "S"], counts: Int64[np.ndarray, "S N"]
) -> tuple[Float64[np.ndarray, "N"], Float64[np.ndarray, "N"]]:
    """The standard error of a sum of S independent means, and its degrees of freedom, N times.

    Satterthwaite 1946: (sum of v)^2 / sum of v^2 / (n - 1), where v = variance / n; for one mean
    that is n - 1.
    """
    v = variances[:, None] / counts  # (S, N)
    total = v.sum(axis=0)
    v = np.where(total > 0, v, 1.0)  # of no variance each has an equal share
    return np.sqrt(total), v.sum(axis=0) ** 2 / (v**2 / (counts - 1)).sum(axis=0)


def interval(losses: Losses) -> tuple[float, float, float]:
    """The mean over two seeds or more, and its own confidence interval (Student's t)."""
    mean, n = statistics.fmean(losses.values()), len(losses)
    error = statistics.stdev(losses.values()) / math.sqrt(n)
    margin = float(student.isf((1 - CONFIDENCE) / 2, n - 1)) * error
    return mean, mean - margin, mean + margin
