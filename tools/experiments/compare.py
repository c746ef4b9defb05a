"""Compare settings over seeds: `python -m tools.experiments.compare [--metric KEY] [REV ...]`.

It reads HEAD and its finished experiments, or other revisions and theirs, or single experiments by
name. It prints a table and draws the results.

    read.py --> Experiment --group--> ComparedSetting --statistics.py--> table, figure.py

Two results have the same setting if they agree in all settings but the seed, in code and in text:
results of different code are never averaged. A note names each result that cannot be used.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lm.base.console import count, say
from lm.base.errors import InputError, one_line_errors
from lm.base.files import atomic_write
from tools.experiments.figure import figure
from tools.experiments.read import (
    CODE,
    SEED,
    TEXT,
    WHICH,
    Experiment,
    flat,
    label,
    read_experiments,
    show,
    varying,
)
from tools.experiments.statistics import CONFIDENCE, MAX_SEEDS, POWER, ComparedSetting, compare

LOSS, BITS = "metrics/eval.json:loss_nats", "metrics/eval.json:bits_per_byte"
TITLES = {LOSS: "Validation loss, nats per token", BITS: "Validation loss, bits per byte"}
TABLE, PLOT = Path("metrics/compare.md"), Path("metrics/compare.svg")


def report(experiments: list[Experiment], metric: str | None) -> tuple[str, dict[str, Any]]:
    """Return the table with notes on it (Markdown), and the plot (Vega-Lite).

    Raises InputError for an unknown metric, or for fewer than two results.
    """
    finished = [e for e in experiments if e.state == "success" or e.metrics]
    tokenizers = {e.tokenizer for e in finished if e.metrics}
    metric = choose_metric(finished, metric or (LOSS if len(tokenizers) < 2 else BITS))
    rows, notes = group(finished, metric)
    if sum(len(row.losses) for row in rows) < 2:
        ends = "".join(f"; {e.name} {e.diverged}" for e in experiments if e.diverged)
        raise InputError(
            f"fewer than two finished experiments with {metric}; `make sweep` or `dvc exp run` "
            f"makes some, `dvc exp show` lists them{ends}"
        )
    best, differences = compare([row.losses for row in rows])
    for i, (row, difference) in enumerate(zip(rows, differences, strict=True)):
        row.difference, row.is_best = difference, i == best and any(differences)
    rows.sort(key=lambda row: (len(row.losses) == 1, row.mean))
    without = diverged(experiments, rows)
    names = varying([*(row.setting for row in rows), *(setting for setting, _ in without)])
    for state in ("failed", "running", "queued"):
        if left_out := [e.name for e in experiments if e.state == state]:
            notes.append(f"Left out, {state}: {', '.join(left_out)}.")
    notes += mixtures(finished, names, metric)
    lines = [
        *table(rows, names, metric, without),
        "",
        *(f"- {n}" for n in conclusions(rows, names) + notes),
    ]
    return "\n".join(lines) + "\n", figure(rows, names, title(metric))


def choose_metric(experiments: list[Experiment], wanted: str) -> str:
    """Return the metric of this name: file:key, eval.key, or a key that only one file has."""
    known = sorted({name for e in experiments for name in e.metrics})
    short = {name: name.removeprefix("metrics/").replace(".json:", ".") for name in known}
    found = [n for n in known if wanted in (n, short[n], n.partition(":")[2])]
    if len(found) == 1 or not known:
        return found[0] if found else wanted
    problem = f"could be {' or '.join(short[n] for n in found)}" if found else "unknown metric"
    raise InputError(f"--metric {wanted}: {problem}; there are {', '.join(short.values())}")


def group(experiments: list[Experiment], metric: str) -> tuple[list[ComparedSetting], list[str]]:
    """Return the results of each setting, and notes on the results that were left out.

    A result that several experiments share counts once. If one seed of a setting gave different
    results, none of them counts.
    """
    results: dict[str, dict[int, dict[float, list[str]]]] = {}  # names by setting, seed and loss
    missing, infinite, notes = [], [], []
    for experiment in experiments:
        value = experiment.metrics.get(metric)
        if value is None:
            missing.append(experiment.name)
        elif not math.isfinite(value):
            infinite.append(experiment.name)
        else:
            setting = {k: v for k, v in sorted(experiment.made_by.items()) if k != SEED}
            seeds = results.setdefault(json.dumps(setting), {})
            of_seed = seeds.setdefault(experiment.made_by[SEED], {})
            of_seed.setdefault(value, []).append(experiment.name)
    rows = [ComparedSetting(json.loads(key), {}) for key in results]
    names = varying(row.setting for row in rows)
    for row, seeds in zip(rows, results.values(), strict=True):
        for seed, found in sorted(seeds.items()):
            if len(found) == 1:
                row.losses[seed] = min(found)
                continue
            values = ", ".join(f"{value} ({', '.join(who)})" for value, who in found.items())
            notes.append(
                f"**{label(row.setting, names)}, seed {seed} gave different results, left out: "
                f"{values}.** Code, settings and text agree; did the environment change?"
            )
    for names, what in ((missing, f"without {metric}"), (infinite, f"{metric} is not finite")):
        if names:
            notes.append(f"{len(names)} {what}, left out: {', '.join(names)}.")
    return [row for row in rows if row.losses], notes


def diverged(
    experiments: list[Experiment], rows: list[ComparedSetting]
) -> list[tuple[dict[str, Any], dict[int, str]]]:
    """Return each setting with which a training diverged, and by seed how it did.

    Such a run has no dvc.lock: take what it lacks from the rows, where those agree.
    """
    several = varying(row.setting for row in rows)
    rest = {k: "?" if k in several else show(v) for row in rows for k, v in row.setting.items()}
    found: dict[str, tuple[dict[str, Any], dict[int, str]]] = {}
    for experiment in experiments:
        if experiment.diverged:
            setting = {name: experiment.params.get(name, value) for name, value in rest.items()}
            _, seeds = found.setdefault(json.dumps(setting), (setting, {}))
            seeds[experiment.params[SEED]] = experiment.diverged
    return list(found.values())


def table(
    rows: list[ComparedSetting],
    names: list[str],
    metric: str,
    without: Iterable[tuple[Mapping[str, Any], Mapping[int, str]]],
) -> list[str]:
    """Return a Markdown table under the metric's name: the rows, then settings without a result."""
    n = decimals(rows)
    head = [*(names or ["setting"]), "seeds", "mean", "standard deviation", "range", "verdict"]
    lines = [
        f"**{title(metric)}** (`{metric}`), lower is better.",
        "",
        f"| {' | '.join([*head, 'seeds to tell'])} |",
        f"|{'---|' * (len(head) - 5)}---:|---:|---:|---:|---|---:|",
    ]

    def add_line(setting: Mapping[str, Any], *figures: str) -> None:
        cells = [show(setting.get(name, "")) for name in names] or ["all the same"]
        lines.append(f"| {' | '.join([*cells, *figures])} |")

    for row in rows:
        values, spread, ends, needed = list(row.losses.values()), "", "", ""
        if len(values) > 1:
            spread = f"{statistics.stdev(values):.{n}f}"
            ends = f"{min(values):.{n}f} to {max(values):.{n}f}"
        if (d := row.difference) and not d.shown:
            needed = f"about {d.seeds_needed}" if d.seeds_needed else f"> {MAX_SEEDS}"
        mean = f"{row.mean:.{n}f}"
        add_line(row.setting, str(len(values)), mean, spread, ends, verdict(row, n), needed)
    for setting, seeds in without:
        how = "; ".join(dict.fromkeys(seeds.values()))
        add_line(setting, str(len(seeds)), "", "", "", how, "")
    return lines


def title(metric: str) -> str:
    """Return the metric in words, with its unit where it is known."""
    return TITLES.get(metric, metric.partition(":")[2])


def decimals(rows: list[ComparedSetting]) -> int:
    """Return the number of decimals that shows five digits of the largest result."""
    largest = max(abs(loss) for row in rows for loss in row.losses.values())
    return max(0, 4 - math.floor(math.log10(largest))) if largest else 0


def verdict(row: ComparedSetting, n: int) -> str:
    """Return in words, with n decimals, how a setting compares with the best one."""
    d = row.difference
    if row.is_best:
        return "best"
    if d is None and len(row.losses) == 1:
        return "one seed: nothing can be said"
    if d is None:
        return "nothing to compare with"
    words = "no difference shown"
    if d.shown:
        words = f"{'worse' if d.mean > 0 else 'better'} than the best"
    ci = f"{CONFIDENCE:.0%} CI {d.low:.{n}f} to {d.high:.{n}f}"
    return f"{words}: {d.mean:+.{n}f} ({ci}{'' if d.paired else ', unpaired'})"


def conclusions(rows: list[ComparedSetting], names: list[str]) -> list[str]:
    """Return notes on how the verdicts were found, and on what they do not say."""
    compared = [row.difference for row in rows if row.difference]
    if not compared:
        return ["Nothing can be compared: it takes two settings with two seeds each."]
    n, pairs = decimals(rows), sum(d.paired for d in compared)
    others = len(compared) - pairs
    how = [f"paired t over shared seeds ({count(pairs, 'comparison')})"] if pairs else []
    how += [f"Welch's t ({count(others, 'comparison')})"] if others else []
    margins = sorted({f"{d.margin:.{n}f}" for d in compared}, key=float)
    smallest = " to ".join(dict.fromkeys((margins[0], margins[-1])))
    (best,) = (row for row in rows if row.is_best)
    looks = math.comb(len(compared) + 1, 2)
    return [
        f"Compared by {' and '.join(how)}. All intervals hold together with {CONFIDENCE:.0%}: "
        f"Bonferroni over {count(looks, 'pair')} of settings, because the best was "
        "picked from the same results.",
        f"The smallest difference that these seeds could show: {smallest}. "
        f"Seeds to tell: of each setting, for the difference seen, with {POWER:.0%} power.",
        f"The mean of {label(best.setting, names)} is too low on average, since it was picked for "
        "being low (winner's curse): run it with new seeds before you quote it.",
        *(
            f"{label(row.setting, names)} is lower than the best, with one seed: give it more."
            for row in rows
            if len(row.losses) == 1 and row.mean < best.mean
        ),
    ]


def mixtures(experiments: list[Experiment], names: list[str], metric: str) -> list[str]:
    """Return notes on differences between the experiments other than settings."""
    notes = []
    if len({e.tokenizer for e in experiments if e.metrics}) > 1:
        unit = "so these are bits per byte" if metric == BITS else "use --metric eval.bits_per_byte"
        notes.append(f"The tokenizers differ: figures per token cannot be compared; {unit}.")
    if TEXT in names or any(name.startswith("data.") for name in names):
        notes.append("The text or its split differs: losses on two texts cannot be compared.")
    if CODE in names:
        notes.append("The code differs (see the column): it may explain a difference.")
    environments = [flat(e.environment) for e in experiments if e.environment]
    if differing := varying(environments):
        notes.append(
            f"The environments differ in {', '.join(differing)}: one seed gives different runs."
        )
    return notes


def main() -> None:
    """Print the table and write it and the plot to metrics/."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("revisions", nargs="*", metavar="REV", help=WHICH)
    default = "default: eval.loss_nats, or eval.bits_per_byte if the tokenizers differ"
    parser.add_argument("--metric", help=default)
    arguments = parser.parse_args()
    with one_line_errors():
        write(*report(read_experiments(arguments.revisions), arguments.metric))


def write(text: str, spec: dict[str, Any], table: Path = TABLE, plot: Path = PLOT) -> None:
    """Print the table; write it and its plot."""
    import vl_convert

    atomic_write(table, text.encode())
    atomic_write(plot, vl_convert.vegalite_to_svg(spec).encode())
    say(f"{text}\nTable in {table}, plot in {plot}")


if __name__ == "__main__":
    main()
