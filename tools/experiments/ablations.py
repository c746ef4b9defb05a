"""Measure what each part of the model is worth: `python -m tools.experiments.ablations`.

`make ablations` calls it after tools.heal. Each variant is params.yaml with some settings changed.
The queue of tools.experiments.sweep runs it with every seed, and tools.experiments.compare compares
the results. A variant that diverges counts as a result.
"""

import argparse
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm.base.console import count
from lm.base.errors import InputError, one_line_errors
from lm.base.params import load_params
from lm.base.paths import PARAMS
from tools.experiments.compare import report, write
from tools.experiments.read import CODE, SEED, TEXT, Experiment
from tools.experiments.sweep import DONE, ENDED, Point, find, require_results, run_all

PAGE, PLOT = Path("docs/ABLATIONS.md"), Path("docs/images/ablations.svg")
PARAMETERS = "metrics/train.json:parameters"


def variants(model: Mapping[str, Any]) -> dict[str, Point]:
    """Return the settings of each variant by its name, at about the default's number of parameters.

    SiLU has two matrices where SwiGLU has three, so they are 3/2 as wide (Shazeer 2020, sec. 2).
    Raises InputError if that is not a whole number.
    """
    if model["d_ff"] % 2:
        raise InputError(f"model.d_ff = {model['d_ff']}: must be even, SiLU takes 3/2 of it")
    return {
        "default": (),
        "no norm": ("model.norm=none",),
        "post-norm": ("model.norm_position=post",),
        "no RoPE": ("model.position_embedding=none",),
        "SiLU": ("model.ffn=silu", f"model.d_ff={model['d_ff'] * 3 // 2}"),
    }


def ablations(seeds: list[str]) -> None:
    """Run the missing points and write the page. Raises InputError if an experiment failed."""
    params = load_params(PARAMS)
    changes = variants(params["model"])
    grid = {(name, seed): (*changes[name], f"{SEED}={seed}") for seed in seeds for name in changes}
    after = run_all(list(grid.values()))
    results: dict[str, list[Experiment]] = {name: [] for name in changes}
    for (name, _), point in grid.items():
        results[name] += (find(after, point, DONE) or find(after, point, ENDED))[:1]
    require_results(after, grid.values(), "make ablations")
    train, context = params["train"], params["model"]["context_length"]
    budget = f"{count(train['max_steps'], 'step')} of {train['batch_size']} x {context} tokens"
    write(*page(changes, results, budget), PAGE, PLOT)


def page(
    changes: Mapping[str, Point], results: Mapping[str, Sequence[Experiment]], budget: str
) -> tuple[str, dict[str, Any]]:
    """Return the page for docs/ (Markdown) and the plot (Vega-Lite)."""
    named = [identified(name, one) for name, several in results.items() for one in several]
    text, plot = report(named, None)
    what = ["| variant | settings | parameters |", "|---|---|---:|"]
    for name, settings in changes.items():
        sizes = [f"{e.metrics[PARAMETERS]:,.0f}" for e in results[name] if e.metrics][:1]
        shown = ", ".join(f"`{setting}`" for setting in settings) or "as in `params.yaml`"
        what.append(f"| {name} | {shown} | {''.join(sizes)} |")
    template = Path(__file__).with_name("ablations.md").read_text(encoding="utf-8")
    return template.format(budget=budget, what="\n".join(what), table=text, plot=PLOT.name), plot


def identified(name: str, experiment: Experiment) -> Experiment:
    """Return the experiment with the variant's name instead of its settings."""
    if experiment.diverged:
        return replace(experiment, params={"variant": name, SEED: experiment.params[SEED]})
    kept = {key: experiment.made_by[key] for key in (SEED, CODE, TEXT)}
    return replace(experiment, made_by={"variant": name} | kept)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", default="1,2,3", metavar="SEED,SEED", help="default: 1,2,3")
    seeds = parser.parse_args().seeds.split(",")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with one_line_errors():
        ablations(seeds)
