"""Compare settings over seeds: `python -m tools.experiments.compare [--metric KEY] [REV ...]`.

No stage of dvc.yaml: it reads HEAD and its finished experiments (or other revisions and theirs, or
single experiments by name), prints a table and draws the results.

    read.py --> Experiment --group--> ComparedSetting --statistics.py--> table, figure.py

A setting is all settings but the seed, and the code and the text too: results of different code
are never averaged. What cannot be used is named.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lm.base.console import say
from lm.base.errors import InputError, one_line_errors
from lm.base.files import atomic_write
from tools.experiments.figure import figure
from tools.experiments.read import CODE, SEED, TEXT, Experiment, flat, label, read_experiments, show
from tools.experiments.statistics import (
    CONFIDENCE,
    MAX_SEEDS,
    POWER,
    ComparedSetting,
    Difference,
    compare,
)

LOSS, BITS = "metrics/eval.json:loss_nats", "metrics/eval.json:bits_per_byte"
TITLES = {LOSS: "Validation loss, nats per token", BITS: "Validation loss, bits per byte"}
TABLE, PLOT = Path("metrics/compare.md"), Path("metrics/compare.svg")


def report(experiments: list[Experiment], metric: str | None) -> tuple[str, dict[str, Any]]:
    """The table with what must be said of it (Markdown), and the plot (Vega-Lite).

    Raises InputError for an unknown metric, or if there are no two results to compare.
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
    for i, row in enumerate(rows):
        row.difference, row.is_best = differences[i], i == best and any(differences)
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
    """The metric that is meant by file:key, by eval.key or by a key that only one file has."""
    known = sorted({name for e in experiments for name in e.metrics})
    short = {name: name.removeprefix("metrics/").replace(".json:", ".") for name in known}
    found = [n for n in known if wanted in (n, short[n], n.partition(":")[2])]
    if len(found) == 1 or not known:
        return found[0] if found else wanted
    problem = f"can be {' or '.join(short[n] for n in found)}" if found else "unknown metric"
    raise InputError(f"--metric {wanted}: {problem}; there are {', '.join(short.values())}")


def group(experiments: list[Experiment], metric: str) -> tuple[list[ComparedSetting], list[str]]:
    """A row for each setting, and notes on what is in none of them.

    A result that several experiments share counts once. If one seed of a setting gave different
    results, none of them counts.
    """
    settings: dict[str, dict[str, Any]] = {}
    results: dict[str, dict[int, dict[float, list[str]]]] = {}
    missing, infinite, notes = [], [], []
    for experiment in experiments:
        value = experiment.metrics.get(metric)
        if value is None:
            missing.append(experiment.name)
        elif not math.isfinite(value):
            infinite.append(experiment.name)
        else:
            setting = {k: v for k, v in sorted(experiment.made_by.items()) if k != SEED}
            key = json.dumps(setting)
            settings[key] = setting
            of_seed = results.setdefault(key, {}).setdefault(experiment.made_by[SEED], {})
            of_seed.setdefault(value, []).append(experiment.name)
    names = varying(settings.values())
    rows = []
    for key, seeds in results.items():
        for seed, found in seeds.items():
            if len(found) > 1:
                values = ", ".join(f"{value} ({', '.join(who)})" for value, who in found.items())
                notes.append(
                    f"**{label(settings[key], names)}, seed {seed} gave different results, left "
                    f"out: {values}.** Code, settings and text agree: another environment?"
                )
        losses = {seed: min(found) for seed, found in sorted(seeds.items()) if len(found) == 1}
        if losses:
            rows.append(ComparedSetting(settings[key], losses))
    for names, what in ((missing, f"without {metric}"), (infinite, f"{metric} is not finite")):
        if names:
            notes.append(f"{len(names)} {what}, left out: {', '.join(names)}.")
    return rows, notes


def diverged(
    experiments: list[Experiment], rows: list[ComparedSetting]
) -> list[tuple[dict[str, Any], dict[int, str]]]:
    """The settings with which a training diverged, and how, by seed.

    They have no dvc.lock: what else made them is what made the rows, where those agree.
    """
    known = {name: {show(row.setting.get(name, "")) for row in rows} for row in rows
             for name in row.setting}  # fmt: skip
    rest = {name: min(values) if len(values) == 1 else "?" for name, values in known.items()}
    found: dict[str, tuple[dict[str, Any], dict[int, str]]] = {}
    for experiment in experiments:
        if experiment.diverged:
            setting = {name: experiment.params.get(name, rest[name]) for name in known}
            _, seeds = found.setdefault(json.dumps(setting), (setting, {}))
            seeds[experiment.params[SEED]] = experiment.diverged
    return list(found.values())


def varying(settings: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names whose values are not the same in all settings."""
    several = list(settings)
    names = {name: None for setting in several for name in setting}
    return [n for n in names if len({show(setting.get(n, "")) for setting in several}) > 1]


def table(
    rows: list[ComparedSetting],
    names: list[str],
    metric: str,
    without: Iterable[tuple[Mapping[str, Any], Mapping[int, str]]] = (),
) -> list[str]:
    """The rows as a Markdown table, under the metric's name, then those without a result."""
    n = decimals(rows)
    lines = [
        f"**{title(metric)}** (`{metric}`), lower is better.",
        "",
        f"| {' | '.join(names or ['setting'])} | seeds | mean | standard deviation | range "
        "| verdict | seeds to tell |",
        f"|{'---|' * len(names or ['setting'])}---:|---:|---:|---:|---|---:|",
    ]
    for row in rows:
        values = list(row.losses.values())
        cells = [show(row.setting.get(name, "")) for name in names] or ["all the same"]
        cells += [str(len(values)), f"{row.mean:.{n}f}"]
        cells += [f"{statistics.stdev(values):.{n}f}" if len(values) > 1 else ""]
        cells += [f"{min(values):.{n}f} to {max(values):.{n}f}" if len(values) > 1 else ""]
        cells += [verdict(row, n), seeds_to_tell(row.difference)]
        lines.append(f"| {' | '.join(cells)} |")
    for setting, seeds in without:
        cells = [show(setting.get(name, "")) for name in names] or ["all the same"]
        cells += [str(len(seeds)), "", "", "", "; ".join(dict.fromkeys(seeds.values())), ""]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def title(metric: str) -> str:
    """What a metric is, with its unit where we know it."""
    return TITLES.get(metric, metric.partition(":")[2])


def decimals(rows: list[ComparedSetting]) -> int:
    """So many that five digits of the largest result are told."""
    largest = max(abs(loss) for row in rows for loss in row.losses.values())
    return max(0, 4 - math.floor(math.log10(largest))) if largest else 0


def verdict(row: ComparedSetting, n: int) -> str:
    """What can be said of a setting beside the best one."""
    if row.is_best:
        return "best"
    if row.difference is None:
        alone = len(row.losses) == 1
        return "one seed: nothing can be said" if alone else "nothing to compare with"
    d = row.difference
    words = "no difference shown"
    if d.shown:
        words = f"{'worse' if d.mean > 0 else 'better'} than the best"
    ci = f"{CONFIDENCE:.0%} CI {d.low:.{n}f} to {d.high:.{n}f}"
    return f"{words}: {d.mean:+.{n}f} ({ci}{'' if d.paired else ', unpaired'})"


def seeds_to_tell(difference: Difference | None) -> str:
    """How many seeds each setting would need."""
    if difference is None or difference.shown:
        return ""
    return f"about {difference.seeds_needed}" if difference.seeds_needed else f"> {MAX_SEEDS}"


def conclusions(rows: list[ComparedSetting], names: list[str]) -> list[str]:
    """How the verdicts come about, and what they do not say."""
    compared = [row.difference for row in rows if row.difference]
    if not compared:
        return ["Nothing can be compared: it takes two settings with two seeds each."]
    n, pairs = decimals(rows), sum(d.paired for d in compared)
    how = [f"paired t over shared seeds ({pairs})"] if pairs else []
    how += [f"Welch's t ({len(compared) - pairs})"] if pairs < len(compared) else []
    least, most = (f"{pick(d.margin for d in compared):.{n}f}" for pick in (min, max))
    smallest = least if least == most else f"{least} to {most}"
    (best,) = (row for row in rows if row.is_best)
    lower = [r for r in rows if not r.difference and min(r.losses.values()) < best.mean]
    looks = math.comb(len(compared) + 1, 2)
    return [
        f"Compared by {' and '.join(how)}. All intervals hold together with {CONFIDENCE:.0%}: "
        f"Bonferroni over {looks} pair{'s' * (looks > 1)} of settings, because the best was "
        "picked from the same results.",
        f"The smallest difference that these seeds could show: {smallest}. "
        f"Seeds to tell: of each setting, for the difference seen, with {POWER:.0%} power.",
        f"The mean of {label(best.setting, names)} is too low on average, since it was picked for "
        "being low (winner's curse): run it with new seeds before you quote it.",
        *(
            f"{label(row.setting, names)} is lower than the best, with one seed: give it more."
            for row in lower
            if not row.is_best
        ),
    ]


def mixtures(experiments: list[Experiment], names: list[str], metric: str) -> list[str]:
    """What the experiments do not share and should, for a comparison to be of settings alone."""
    notes = []
    if len({e.tokenizer for e in experiments if e.metrics}) > 1:
        unit = "so these are bits per byte" if metric == BITS else "use --metric eval.bits_per_byte"
        notes.append(f"The tokenizers differ: figures per token do not compare; {unit}.")
    if TEXT in names or any(name.startswith("data.") for name in names):
        notes.append("The text or its split differs: losses on different texts do not compare.")
    if CODE in names:
        notes.append("The code differs (see the column): a difference may be the code's.")
    environments = [flat(e.environment) for e in experiments if e.environment]
    if differing := varying(environments):
        notes.append(
            f"The environments differ in {', '.join(differing)}: a seed is not the same run."
        )
    return notes


def main() -> None:
    """Print the table and write it and the plot to metrics/."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    which = "a commit, with its experiments, or an experiment by name; default: HEAD"
    parser.add_argument("revisions", nargs="*", metavar="REV", help=which)
    default = "default: eval.loss_nats, or eval.bits_per_byte if the tokenizers differ"
    parser.add_argument("--metric", help=default)
    arguments = parser.parse_args()
    with one_line_errors():
        publish(*report(read_experiments(arguments.revisions), arguments.metric))


def publish(text: str, spec: dict[str, Any]) -> None:
    """Print the table, write metrics/compare.md and metrics/compare.svg."""
    import vl_convert

    atomic_write(TABLE, text.encode())
    atomic_write(PLOT, vl_convert.vegalite_to_svg(spec).encode())
    say(f"{text}\nTable in {TABLE}, plot in {PLOT}")


if __name__ == "__main__":
    main()
