"""Count false findings: sweeps of equal settings, whose losses are only seed noise.

    python -m benchmarks.seeds

It prints the share of sweeps in which at least one setting is "worse than the best", by the number
of comparisons that the intervals allow for. tools/experiments/statistics.py uses the last row.
"""

import math

import numpy as np

from tools.experiments.statistics import difference

SETTINGS, SEEDS, SWEEPS = 9, 5, 2000
ROWS = {
    "no correction": 1,
    "for the comparisons made": SETTINGS - 1,
    "for all pairs of settings": math.comb(SETTINGS, 2),
}


def main() -> None:
    rng = np.random.default_rng(0)
    found = dict.fromkeys(ROWS, 0)
    for _ in range(SWEEPS):
        losses = rng.standard_normal((SETTINGS, SEEDS))
        rows = [dict(enumerate(row.tolist())) for row in losses]
        best = int(losses.mean(axis=1).argmin())
        for name, comparisons in ROWS.items():
            found[name] += any(
                difference(row, rows[best], comparisons).shown
                for i, row in enumerate(rows)
                if i != best
            )
    print(f"{SWEEPS} sweeps of {SETTINGS} equal settings with {SEEDS} seeds\n")
    print("| correction | something is found |\n|---|---:|")
    for name, count in found.items():
        print(f"| {name} | {count / SWEEPS:.1%} |")


if __name__ == "__main__":
    main()
