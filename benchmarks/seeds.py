"""How often is nothing called something? Sweeps of equal settings, their losses pure seed noise.

    python -m benchmarks.seeds

The share of sweeps in which at least one setting is "worse than the best", by how many comparisons
the intervals allow for. tools/experiments/statistics.py takes the last row.
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
