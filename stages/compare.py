"""Compare settings over seeds: `python -m stages.compare [--metric eval.loss_nats] [REV ...]`.

No stage of dvc.yaml: it reads HEAD and its finished experiments (or other revisions and theirs, or
single experiments by name), prints a table and draws the results; lm/compare.py has the statistics.

    dvc exp show, dvc.lock --read_experiments--> Experiment --group--> Row --compare--> table, plot

What made a result is read from dvc.lock, which DVC writes with it; params.yaml may have been edited
since. A setting is all settings but the seed, and the code and the text too: results of different
code are never averaged. What cannot be used is named.
"""

import argparse
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm.compare import CONFIDENCE, MAX_SEEDS, POWER, Difference, compare, interval
from lm.config import parse_yaml
from lm.console import say
from lm.errors import EnvironmentFault, InputError, one_line_errors
from lm.files import atomic_write, sha256_json

SEED, CODE, TEXT = "train.seed", "code", "text"
LOSS, BITS = "metrics/eval.json:loss_nats", "metrics/eval.json:bits_per_byte"
TITLES = {LOSS: "Validation loss, nats per token", BITS: "Validation loss, bits per byte"}
BLUE = "#4c78a8"
TABLE, PLOT = Path("metrics/compare.md"), Path("metrics/compare.svg")


@dataclass
class Experiment:
    """A row of `dvc exp show`, and what its dvc.lock says of it."""

    name: str
    rev: str
    state: str  # success, running, queued, failed; of a commit: baseline
    params: dict[str, Any]  # of params.yaml, by section.key
    metrics: dict[str, float] = field(default_factory=dict)  # by file:key
    made_by: dict[str, Any] = field(default_factory=dict)  # settings, code and text of the results
    tokenizer: str | None = None  # its hash
    environment: dict[str, str] = field(default_factory=dict)


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


def read_experiments(revisions: list[str]) -> list[Experiment]:
    """Revisions and their experiments, as `dvc exp show` lists them; HEAD's if none is given.

    Raises InputError for what git and DVC do not know.
    """
    from dvc.exceptions import DvcException  # takes 0.3 s
    from dvc.repo import Repo

    found = []
    try:
        with Repo() as repo:
            if repo.scm.no_commits:
                raise InputError("git has no commit, and an experiment starts from one: commit")
            for base in _shown(repo, revisions):
                found.append(_read(repo, base, base.name, "baseline"))
                for one in base.experiments or []:
                    state = one.executor.state if one.executor else "success"
                    found.append(_read(repo, one[0], one.name, state))
    except DvcException as error:
        raise InputError(str(error)) from None
    return found


def _shown(repo: Any, revisions: list[str]) -> Any:
    """What `dvc exp show` shows; it stumbles over a task that a worker is just setting up."""
    from dvc.exceptions import NotDvcRepoError

    for _ in range(10):
        with suppress(FileNotFoundError, NotADirectoryError, NotDvcRepoError):
            return repo.experiments.show(revs=revisions, hide_workspace=True)
        time.sleep(0.5)
    raise EnvironmentFault("`dvc exp show` fails; run it to see why")


def _read(repo: Any, shown: Any, name: str | None, state: str) -> Experiment:
    params = shown.data.params.get("params.yaml", {}).get("data", {}) if shown.data else {}
    experiment = Experiment(name or shown.rev[:7], shown.rev, state, flat(params))
    if shown.data and state in ("success", "baseline"):
        with repo.switch(shown.rev):
            if repo.dvcfs.exists("dvc.lock"):
                lock = parse_yaml(repo.dvcfs.read_text("dvc.lock"), "dvc.lock")
                _read_lock(repo, experiment, lock)
    if experiment.made_by:
        experiment.metrics = {
            f"{path}:{key}": value
            for path, file in shown.data.metrics.items()
            for key, value in flat(file.get("data", {})).items()
            if is_number(value)
        }
    return experiment


def _read_lock(repo: Any, experiment: Experiment, lock: dict[str, Any]) -> None:
    """Take in what made the results, unless a stage was run again and not yet those after it."""
    facts: dict[str, set[str]] = defaultdict(set)
    read, made, settings = set[str](), set[str](), dict[str, Any]()
    for stage in lock.get("stages", {}).values():
        deps, outs = stage.get("deps", []), stage.get("outs", [])
        read |= {file["path"] for file in deps}
        made |= {file["path"] for file in outs}
        for file in deps + outs:
            facts[file["path"]].add(json.dumps(file.get("md5", file)))
        for key, value in flat(stage.get("params", {}).get("params.yaml", {})).items():
            facts[f"setting {key}"].add(json.dumps(value))
            settings[key] = value
    if SEED in settings and all(len(values) == 1 for values in facts.values()):
        sources = {name: min(facts[name]) for name in sorted(read - made)}
        code = {name: md5 for name, md5 in sources.items() if name.endswith(".py")}
        text = [md5 for name, md5 in sources.items() if name not in code]
        ids = {CODE: sha256_json(code)[:7], TEXT: sha256_json(text)[:7]}
        experiment.made_by = settings | ids
        experiment.tokenizer = min(facts["data/tokenizer"], default=None)
        experiment.environment = _environment(repo, json.loads(min(facts["models/model"])))


def _environment(repo: Any, model_md5: str) -> dict[str, str]:
    """Of the model's provenance; empty if the model is not in the cache."""
    cache = repo.cache.local
    try:
        files = json.loads(Path(cache.oid_to_path(model_md5)).read_text())
        (md5,) = (file["md5"] for file in files if file["relpath"] == "provenance.json")
        return dict(json.loads(Path(cache.oid_to_path(md5)).read_text())["environment"])
    except (OSError, ValueError):
        return {}


def flat(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as one, with dots in its keys."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{inner}": leaf for inner, leaf in flat(value).items()}
        else:
            found[key] = value
    return found


def report(experiments: list[Experiment], metric: str | None) -> tuple[str, dict[str, Any]]:
    """The table with what must be said of it (Markdown), and the plot (Vega-Lite).

    Raises InputError for an unknown metric, or if there are no two results to compare.
    """
    finished = [e for e in experiments if e.state == "success" or e.metrics]
    tokenizers = {e.tokenizer for e in finished if e.metrics}
    metric = choose_metric(finished, metric or (LOSS if len(tokenizers) < 2 else BITS))
    rows, notes = group(finished, metric)
    if sum(len(row.losses) for row in rows) < 2:
        raise InputError(
            f"fewer than two finished experiments with {metric}; `make sweep` or `dvc exp run` "
            "makes some, `dvc exp show` lists them"
        )
    best, differences = compare([row.losses for row in rows])
    for i, row in enumerate(rows):
        row.difference, row.is_best = differences[i], i == best and any(differences)
    rows.sort(key=lambda row: (len(row.losses) == 1, row.mean))
    names = varying(row.setting for row in rows)
    for state in ("failed", "running", "queued"):
        if left_out := [e.name for e in experiments if e.state == state]:
            notes.append(f"Left out, {state}: {', '.join(left_out)}.")
    notes += mixtures(finished, names, metric)
    lines = [*table(rows, names, metric), "", *(f"- {n}" for n in conclusions(rows, names) + notes)]
    return "\n".join(lines) + "\n", figure(rows, names, metric)


def choose_metric(experiments: list[Experiment], wanted: str) -> str:
    """The metric that is meant by file:key, by eval.key or by a key that only one file has."""
    known = sorted({name for e in experiments for name in e.metrics})
    short = {name: name.removeprefix("metrics/").replace(".json:", ".") for name in known}
    found = [n for n in known if wanted in (n, short[n], n.partition(":")[2])]
    if len(found) == 1 or not known:
        return found[0] if found else wanted
    problem = f"can be {' or '.join(short[n] for n in found)}" if found else "unknown metric"
    raise InputError(f"--metric {wanted}: {problem}; there are {', '.join(short.values())}")


def group(experiments: list[Experiment], metric: str) -> tuple[list[Row], list[str]]:
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
            rows.append(Row(settings[key], losses))
    for names, what in ((missing, f"without {metric}"), (infinite, f"{metric} is not finite")):
        if names:
            notes.append(f"{len(names)} {what}, left out: {', '.join(names)}.")
    return rows, notes


def varying(settings: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names whose values are not the same in all settings."""
    several = list(settings)
    names = {name: None for setting in several for name in setting}
    return [n for n in names if len({show(setting.get(n, "")) for setting in several}) > 1]


def show(value: Any) -> str:
    """A value as params.yaml has it."""
    return value if isinstance(value, str) else json.dumps(value)


def label(setting: Mapping[str, Any], names: list[str]) -> str:
    """A setting as DVC is told of it."""
    return " ".join(f"{name}={show(setting.get(name, ''))}" for name in names) or "the setting"


def table(rows: list[Row], names: list[str], metric: str) -> list[str]:
    """The rows as a Markdown table, under the metric's name."""
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
    return lines


def title(metric: str) -> str:
    """What a metric is, with its unit where we know it."""
    return TITLES.get(metric, metric.partition(":")[2])


def decimals(rows: list[Row]) -> int:
    """So many that five digits of the largest result are told."""
    largest = max(abs(loss) for row in rows for loss in row.losses.values())
    return max(0, 4 - math.floor(math.log10(largest))) if largest else 0


def verdict(row: Row, n: int) -> str:
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


def conclusions(rows: list[Row], names: list[str]) -> list[str]:
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


def figure(rows: list[Row], names: list[str], metric: str) -> dict[str, Any]:
    """Each seed, and each setting's mean with its own confidence interval (Vega-Lite)."""
    numeric = [n for n in names if all(is_number(row.setting.get(n)) for row in rows)]
    x = max(numeric, key=lambda n: len({row.setting[n] for row in rows}), default=None)
    x = x or (names[0] if names else "setting")
    places = [row.setting.get(x, "all the same") for row in rows]
    others = [name for name in names if name != x]
    series = [label(row.setting, others) for row in rows]
    shifted = dodge(x, places, series) if x in numeric else [show(place) for place in places]
    seeds, means = [], []
    for row, place, name in zip(rows, shifted, series, strict=True):
        point = {"x": place, "series": name}
        seeds += [point | {"loss": loss, "seed": seed} for seed, loss in row.losses.items()]
        if len(row.losses) > 1:
            means.append(
                point | dict(zip(("loss", "low", "high"), interval(row.losses), strict=True))
            )
    encoding: dict[str, Any] = {
        "x": {"field": "x", "title": x, "axis": {"labelAngle": 0, "grid": False}},
        "y": {"field": "loss", "type": "quantitative", "title": title(metric),
              "scale": {"domain": domain(seeds, means), "nice": False}},
        "color": {"value": BLUE},
    }  # fmt: skip
    if x in numeric:
        values = sorted(set(places))
        scale = {"type": "log" if is_logarithmic(x, values) else "linear", "zero": False,
                 "nice": False, "padding": 30}  # fmt: skip
        encoding["x"] |= {"type": "quantitative", "scale": scale}
        encoding["x"]["axis"] |= {"values": values, "format": "~g"}
    else:
        encoding["x"] |= {"type": "nominal", "sort": None}
        encoding["xOffset"] = {"field": "series"}
    if others:
        legend = {"orient": "bottom", "columns": 2, "labelLimit": 300}
        encoding["color"] = {"field": "series", "type": "nominal", "title": None, "legend": legend}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "title": {"text": f"{title(metric)}, by {x}", "anchor": "start", "offset": 12,
                  "subtitle": [f"circles: seeds; diamonds: their mean, with its {CONFIDENCE:.0%} "
                               "confidence interval; lower is better",
                               "overlapping bars decide nothing: the table compares pairwise"]},
        "width": 560, "height": 320, "encoding": encoding,
        "layer": [
            {"data": {"values": means},
             "mark": {"type": "rule", "clip": True, "strokeWidth": 2, "opacity": 0.7},
             "encoding": {"y": {"field": "low"}, "y2": {"field": "high"}}},
            {"data": {"values": means if x in numeric else []},
             "mark": {"type": "line", "opacity": 0.3}},
            {"data": {"values": seeds},
             "mark": {"type": "point", "size": 45, "opacity": 0.8, "strokeWidth": 1.5}},
            {"data": {"values": means},
             "mark": {"type": "point", "shape": "diamond", "filled": True, "size": 110}},
        ],
        "config": {"font": "sans-serif", "background": "white", "view": {"stroke": None},
                   "axis": {"labelFontSize": 12, "titleFontSize": 13, "titleFontWeight": "normal",
                            "gridColor": "#e8e8e8", "titlePadding": 10},
                   "title": {"fontSize": 15, "subtitleFontSize": 12, "subtitleColor": "#555",
                             "subtitlePadding": 6},
                   "legend": {"labelFontSize": 12}, "padding": 16},
    }  # fmt: skip


def is_number(value: Any) -> bool:
    """Whether a setting or a metric is a number: true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_logarithmic(name: str, values: list[float]) -> bool:
    """Learning rates, and what spans more than a decade."""
    return min(values) > 0 and (name.endswith("lr") or max(values) > 10 * min(values))


def dodge(name: str, places: list[float], series: list[str]) -> list[float]:
    """Numbers moved a little to the side, so that several series at one place can be told apart."""
    several = sorted(set(series))
    log = is_logarithmic(name, places)
    span = math.log(max(places) / min(places)) if log else max(places) - min(places)
    step = min(0.04, 0.6 / len(several) / len(set(places))) * span
    shifts = [(several.index(s) - (len(several) - 1) / 2) * step for s in series]
    if log:
        return [place * math.exp(shift) for place, shift in zip(places, shifts, strict=True)]
    return [place + shift for place, shift in zip(places, shifts, strict=True)]


def domain(seeds: list[dict[str, Any]], means: list[dict[str, Any]]) -> list[float]:
    """All seeds, and the intervals as far as these do not dwarf them (two seeds: 12 times)."""
    losses = [point["loss"] for point in seeds]
    low, high = min(losses), max(losses)
    span = high - low or abs(high) or 1.0
    low = max(low - span, min([low, *(mean["low"] for mean in means)]))
    high = min(high + span, max([high, *(mean["high"] for mean in means)]))
    return [low - 0.05 * (high - low), high + 0.05 * (high - low)]


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
