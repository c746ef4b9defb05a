"""Make the page of a run, or of two beside each other: HTML that holds all it needs.

    RunResults --what the functions here compute--> page.html --charts drawn by page.js--> browser

The template escapes all that comes from outside. The page's policy also lets a browser run only the
page's own two scripts, known by their hashes, and load nothing. So code in a corpus stays text.
"""

import base64
import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lm.base.console import count, duration
from lm.base.tables import DIVERGED, plain, predictors, remarks_on
from tools.experiments.read import flat, show, varying

HERE = Path(__file__).parent
SECTIONS = {
    "results": "Results",
    "curves": "Training",
    "positions": "Loss by position",
    "calibration": "Calibration",
    "held-out": "Held-out text",
    "samples": "Samples",
    "data": "Data",
    "plan": "Plan and measured",
    "settings": "Settings",
    "provenance": "Provenance",
}
OF_ONE_RUN_ALONE = ("held-out", "plan")
OF_A_DIVERGED_RUN = ("curves", "data", "settings")
LEVELS = 8  # of colour, one for each nat; the last also for all above
Rows = list[dict[str, float]]


@dataclass
class RunResults:
    """The results of a run; each part as its file has it. A run that diverged has few of them."""

    name: str
    commit: str
    params: dict[str, Any]
    data: dict[str, Any]
    train: dict[str, Any]
    curves: Rows
    provenance: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    positions: Rows = field(default_factory=list)
    calibration: Rows = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    held_out: list[dict[str, Any]] = field(default_factory=list)
    performance: dict[str, Any] | None = None  # the times; None if they are not of this run
    changed_code: list[str] = field(default_factory=list)  # files that changed since the training


def page(runs: list[RunResults], vega: str) -> str:
    """Return the page of one run, or of two beside each other."""
    several, diverged = len(runs) > 1, any(DIVERGED in run.train for run in runs)
    sections = {
        name: title
        for name, title in SECTIONS.items()
        if not (several and name in OF_ONE_RUN_ALONE)
        and not (diverged and name not in OF_A_DIVERGED_RUN)
    }
    if several:
        sections["settings"] += " that differ"
    program = (HERE / "page.js").read_text()
    return ENVIRONMENT.get_template("page.html").render(
        runs=runs,
        several=several,
        title=f"{runs[0].name} and {runs[1].name}" if several else "Training report",
        sections=sections,
        data=charts(runs) | ({"tokens": guesses(runs[0])} if "held-out" in sections else {}),
        policy=policy(vega, program),
        style=(HERE / "page.css").read_text(),
        vega=vega,
        program=program,
    )


def policy(*scripts: str) -> str:
    """Return the policy that lets a browser run only these scripts and load nothing.

    Vega compiles its expressions ('unsafe-eval') and gives its pictures styles of their own.
    """
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    hashes = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        f"default-src 'none'; script-src 'unsafe-eval' {hashes}; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def without_control_characters(value: Any) -> Any:
    """Make control characters visible in all that the template inserts, except in its HTML."""
    return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def charts(runs: list[RunResults]) -> dict[str, Any]:
    """Return the points and titles of each chart that page.js draws, by its name."""

    def lines(part: str, x: str, y: str, columns: dict[str, str]) -> dict[str, Any]:
        """Return columns of a part of each run as points; leave out cells that are no number."""
        points = [
            {"x": row[x], "y": float(f"{row[column]:.6g}"), "kind": kind, "run": run.name}
            for column, kind in columns.items()
            for run in runs
            for row in getattr(run, part)
            if math.isfinite(row.get(column, math.nan))
        ]
        return {"points": points, "x": x, "y": y}

    loss, by_step = "loss, nats per token", ("curves", "step")
    return {
        "loss": lines(*by_step, loss, {"train_loss": "training", "valid_loss": "validation"}),
        "learning-rate": lines(*by_step, "learning rate", {"learning_rate": "learning rate"})
        | {"small": True},
        "gradient-norm": lines(*by_step, "gradient norm", {"grad_norm": "gradient norm"})
        | {"small": True},
        "positions": lines("positions", "position", loss, {"loss_nats": "validation"}),
        "calibration": {
            "points": [
                {"x": row["confidence"], "y": row["accuracy"], "tokens": row["tokens"],
                 "run": run.name, "kind": "first guesses"}
                for run in runs
                for row in run.calibration
            ],
            "x": "probability of the first guess", "y": "share that was right", "calibration": True,
        },
    }  # fmt: skip


def guesses(run: RunResults) -> list[Any]:
    """Return name, loss and guesses of each token of the held-out text, for page.js."""
    return [
        [token["name"], token["loss_nats"], token["guesses"]]
        for document in run.held_out
        for token in document["tokens"]
    ]


def visible(text: str) -> Markup:
    """Return a token with its line breaks marked; show a part of a character as a dot."""
    line_break = Markup('<i aria-hidden="true">↵</i>\n')
    return line_break.join(plain(text).split("\n")) or Markup("<i>·</i>")


def completions_by_prompt(runs: list[RunResults]) -> dict[str, list[tuple[float, str, str]]]:
    """Return temperature, run and completion of each sample, by temperature and by run."""
    found: dict[str, list[tuple[float, str, str]]] = {}
    samples = [(sample, run.name) for run in runs for sample in run.samples]
    for sample, name in sorted(samples, key=lambda one: one[0]["temperature"]):
        one = sample["temperature"], name, sample["completion"]
        found.setdefault(sample["prompt"], []).append(one)
    return found


def used_settings(run: RunResults) -> dict[str, Any]:
    """Return the settings by section.key; those of model and train as recorded with the model."""
    recorded = {name: run.provenance[name] for name in ("model", "train") if run.provenance}
    return flat({**run.params, **recorded})


def settings_by_section(run: RunResults) -> dict[str, list[tuple[str, str, str | None]]]:
    """Return key and value of each setting, and the value in params.yaml if that differs."""
    found: dict[str, list[tuple[str, str, str | None]]] = {section: [] for section in run.params}
    in_params = flat(run.params)
    for name, value in used_settings(run).items():
        section, _, key = name.partition(".")
        now = in_params.get(name, value)
        if section in found:
            found[section].append((key, show(value), show(now) if now != value else None))
    return found


def differing_settings(runs: list[RunResults]) -> tuple[int, dict[str, list[str]]]:
    """Return the number of settings, and the values of each that differs between runs."""
    used = [used_settings(run) for run in runs]
    total = len({name for settings in used for name in settings})
    return total, {name: [show(each.get(name, "-")) for each in used] for name in varying(used)}


ENVIRONMENT = Environment(
    loader=FileSystemLoader(HERE),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=without_control_characters,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
ENVIRONMENT.filters["number"] = format
ENVIRONMENT.globals |= {
    function.__name__: function
    for function in (
        completions_by_prompt, count, differing_settings, duration, math.isfinite,
        predictors, remarks_on, settings_by_section, visible,
    )
} | {"DIVERGED": DIVERGED, "LEVELS": LEVELS}  # fmt: skip
