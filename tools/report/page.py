"""The page of a run, or of two beside each other, as HTML that holds all it needs.

Whatever comes from outside goes through `text` or, as data for the script, through `_data`. Beside
that, the page's policy lets a browser run its own two scripts alone, known by their hashes, and
load nothing: what a corpus might smuggle in stays text.
"""

import base64
import hashlib
import html
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm.base.console import count, duration
from lm.base.tables import DIVERGED, ROWS, behind_bigram, ended_worse, plain
from tools.experiments.read import flat, show

HERE = Path(__file__).parent
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the results</a>
<header>
<h1>{title}</h1>
{lead}
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main id="main">
{sections}
</main>
<footer><p>Made by <code>python -m tools.report</code> from the files of this run; \
it loads nothing.</p></footer>
<script type="application/json" id="page-data">{data}</script>
<script>{vega}</script>
<script>{program}</script>
</body>
</html>
"""
Rows = list[dict[str, float]]


@dataclass
class Run:
    """What is known of a run; each part as its file has it. One that diverged has no results."""

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
    performance: dict[str, Any] | None = None  # the clocks; None if they are not of this run
    changed_code: list[str] = field(default_factory=list)  # files that are not what trained it


@dataclass
class Section:
    """A part of the page, under a heading of its own."""

    name: str
    title: str
    body: str
    data: dict[str, Any] = field(default_factory=dict)  # for the script, by name


def page(runs: list[Run], vega: str) -> str:
    """The page of one run, or of two beside each other."""
    makers: list[Callable[[list[Run]], Section | None]] = [
        results, curves, positions, calibration, held_out, samples, data, plan, settings, provenance
    ]  # fmt: skip
    if any(DIVERGED in run.train for run in runs):
        makers = [curves, data, settings]
    sections = [section for make in makers if (section := make(runs))]
    program = (HERE / "page.js").read_text()
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"
        for code in (vega, program)
    )
    title = "Training report" if len(runs) == 1 else f"{runs[0].name} and {runs[1].name}"
    return PAGE.format(
        # Vega compiles its expressions: 'unsafe-eval'; its pictures have styles of their own
        policy=f"default-src 'none'; script-src 'unsafe-eval' {hashes}; "
        "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'",
        title=text(title),
        lead=lead(runs),
        links="".join(f'<li><a href="#{s.name}">{s.title}</a></li>' for s in sections),
        sections="\n".join(
            f'<section id="{s.name}" aria-labelledby="{s.name}-title">\n'
            f'<h2 id="{s.name}-title">{s.title}</h2>\n{s.body}\n</section>'
            for s in sections
        ),
        data=_data({name: value for s in sections for name, value in s.data.items()}),
        style=(HERE / "page.css").read_text(),
        vega=vega,
        program=program,
    )


def text(value: object) -> str:
    """Any value as text that HTML shows as it is, but for control characters."""
    return html.escape(plain(str(value)))


def _data(value: Any) -> str:
    """JSON in which no tag can begin or end."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of HTML cells; the first of a row is its heading."""
    lines = [
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    ]
    columns = "".join(f'<th scope="col">{name}</th>' for name in head)
    return (
        f'<div class="wide"><table class="{kind}"><caption>{caption}</caption>'
        f"<thead><tr>{columns}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def details(summary: str, body: str) -> str:
    """What opens on demand."""
    return f"<details><summary>{summary}</summary>{body}</details>"


def chart(name: str, caption: str) -> str:
    """The place of a chart, which the script draws from the data of the same name."""
    return (
        f'<figure><div class="chart" id="chart-{name}" role="img" '
        f'aria-label="Chart: {name.replace("-", " ")}"></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def lead(runs: list[Run]) -> str:
    """What was trained on what, in a sentence; of two runs, in one each."""
    found = []
    for run in runs:
        device = run.provenance.get("environment", {}).get("device", "an unknown device")
        name = f"<strong>{text(run.name)}</strong>: " if len(runs) > 1 else ""
        end = f"on {text(device)}"
        if DIVERGED in run.train:
            end = f"then it diverged, at step {run.train[DIVERGED]:,}: there is no model"
        found.append(
            f'<p class="lead">{name}{run.train["parameters"]:,} parameters, '
            f"{run.train['tokens']:,} training tokens in {count(run.train['step'], 'step')}, "
            f"{end}.</p>"
        )
    return "".join(found)


METRICS = {
    "loss_nats": ("Loss, nats per token", "{:.4f}"),
    "perplexity": ("Perplexity", "{:,.2f}"),
    "bits_per_byte": ("Bits per byte", "{:.4f}"),
    "accuracy": ("First guess right", "{:.1%}"),
    "calibration_error": ("Calibration error", "{:.2%}"),
    "floor_bits_per_byte": ("Entropy of the grammar, bits per byte", "{:.4f}"),
    "distance_to_floor": ("Above that entropy by", "{:.1%}"),
    "tokens": ("Validation tokens", "{:,}"),
}
TILES = ("loss_nats", "perplexity", "bits_per_byte", "accuracy")


def results(runs: list[Run]) -> Section:
    """The metrics: of one run beside its baselines, of two beside each other."""
    if len(runs) > 1:
        rows = []
        for name, (words, form) in METRICS.items():
            values = [run.evaluation.get(name) for run in runs]
            if any(value is not None for value in values):
                cells = ["-" if value is None else form.format(value) for value in values]
                rows.append([words, *cells, _difference(values, form)])
        head = ["Metric", *(text(run.name) for run in runs), "Difference"]
        return Section(
            "results", "Results", table("On the validation split", head, rows, "figures")
        )
    (run,) = runs
    tiles = "".join(
        f"<div><dt>{METRICS[name][0]}</dt><dd>{METRICS[name][1].format(run.evaluation[name])}</dd>"
        "</div>"
        for name in TILES
        if name in run.evaluation
    )
    losses = {**run.evaluation["baseline_loss_nats"], "loss_nats": run.evaluation["loss_nats"]}
    bits = run.evaluation["bits_per_byte"] / run.evaluation["loss_nats"]
    if floor := run.evaluation.get("floor_bits_per_byte"):
        losses["floor"] = floor / bits
    widest = max(losses.values())
    rows = [
        [f"<strong>{ROWS[key].capitalize()}</strong>" if key == "loss_nats" else
         ROWS[key].capitalize(), f"{loss:.4f}", f"{math.exp(min(loss, 99.0)):,.1f}",
         f"{loss * bits:.4f}", _bar(loss / widest)]
        for key, loss in losses.items()
    ]  # fmt: skip
    head = ["Predictor", "Nats per token", "Perplexity", "Bits per byte", ""]
    caption = (
        f"On the {run.evaluation['tokens']:,} tokens ({run.evaluation['bytes']:,} bytes) of the "
        "validation split; lower is better"
    )
    stopping = run.provenance["train"].get("early_stopping")
    remarks = (
        behind_bigram(run.evaluation, run.evaluation["baseline_loss_nats"]),
        ended_worse(run.train, stopping is not None),
    )
    told = "".join(f'<p class="note">Warning: {text(remark)}.</p>' for remark in remarks if remark)
    body = f'<dl class="tiles">{tiles}</dl>{told}{table(caption, head, rows, "figures")}'
    return Section("results", "Results", body)


def _difference(values: list[Any], form: str) -> str:
    if None in values:
        return "-"
    before, after = values
    return form.replace("{:", "{:+").format(after - before) if after != before else "same"


def _bar(share: float) -> str:
    return f'<span class="bar" style="width:{max(0.0, min(1.0, share)):.1%}"></span>'


def _points(runs: list[Run], part: str, x: str, columns: dict[str, str]) -> list[dict[str, Any]]:
    """Columns of a part of each run as points of a chart; what is no number is left out."""
    return [
        {"x": row[x], "y": float(f"{row[column]:.6g}"), "kind": kind, "run": run.name}
        for column, kind in columns.items()
        for run in runs
        for row in getattr(run, part)
        if math.isfinite(row.get(column, math.nan))
    ]


def curves(runs: list[Run]) -> Section:
    """Loss, learning rate and gradient norm by step."""
    losses = {"train_loss": "training", "valid_loss": "validation"}
    charts = {
        "loss": {
            "points": _points(runs, "curves", "step", losses),
            "x": "step", "y": "loss, nats per token",
        },
        "learning-rate": {
            "points": _points(runs, "curves", "step", {"learning_rate": "learning rate"}),
            "x": "step", "y": "learning rate", "small": True,
        },
        "gradient-norm": {
            "points": _points(runs, "curves", "step", {"grad_norm": "gradient norm"}),
            "x": "step", "y": "gradient norm", "small": True,
        },
    }  # fmt: skip
    told = [
        f"{text(run.name) + ' ends' if len(runs) > 1 else 'It ends'} at training loss "
        f"{_loss(run.train['train_loss'])} and validation loss {_loss(run.train['valid_loss'])}"
        for run in runs
    ]
    body = (
        chart("loss", f"Loss by step. {'; '.join(told)}, of some batches of the split. "
              "Point at a curve for its values; hold Shift and turn the wheel or drag to look "
              "closer, double-click to go back.")
        + '<div class="pair">'
        + chart("learning-rate", "Learning rate, after a warm-up.")
        + chart("gradient-norm", "L2 norm of the gradient before clipping.")
        + "</div>"
    )  # fmt: skip
    rows = [
        [f"{row['step']:,.0f}", *([text(run.name)] if len(runs) > 1 else []),
         f"{row['train_loss']:.4f}", f"{row['valid_loss']:.4f}"]
        for run in runs
        for row in run.curves
        if math.isfinite(row["valid_loss"])
    ]  # fmt: skip
    head = ["Step", *(["Run"] if len(runs) > 1 else []), "Training loss", "Validation loss"]
    body += details("The validations as a table", table("Nats per token", head, rows, "figures"))
    return Section("curves", "Training", body, charts)


def _loss(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


def positions(runs: list[Run]) -> Section:
    """Loss by position in the context."""
    points = _points(runs, "positions", "position", {"loss_nats": "validation"})
    told = "; ".join(
        f"{text(run.name) + ': ' if len(runs) > 1 else ''}{run.positions[0]['loss_nats']:.2f} nats "
        f"at the first position, {_late(run.positions):.2f} over the last quarter"
        for run in runs
    )
    caption = (
        f"Validation loss by position in the window: what context is worth. {told.capitalize()}."
    )
    spec = {"points": points, "x": "position", "y": "loss, nats per token"}
    return Section(
        "positions", "Loss by position", chart("positions", caption), {"positions": spec}
    )


def _late(rows: Rows) -> float:
    last = [row["loss_nats"] for row in rows[-max(1, len(rows) // 4) :]]
    return sum(last) / len(last)


def calibration(runs: list[Run]) -> Section:
    """Does the model know how sure to be?"""
    points = [
        {"x": row["confidence"], "y": row["accuracy"], "tokens": row["tokens"], "run": run.name,
         "kind": "first guesses"}
        for run in runs
        for row in run.calibration
    ]  # fmt: skip
    errors = "; ".join(
        f"{text(run.name) + ': ' if len(runs) > 1 else ''}{run.evaluation['calibration_error']:.2%}"
        for run in runs
    )
    caption = (
        "How often the most probable token came, by the probability that it was given: on the "
        "dashed line a model is as sure as it should be, below it is too sure. The area of a point "
        f"is its number of tokens. Expected calibration error, the mean distance: {errors}."
    )
    rows = [
        [f"{row['above']:.3f} to {row['up_to']:.3f}",
         *([text(run.name)] if len(runs) > 1 else []), f"{row['tokens']:,.0f}",
         f"{row['confidence']:.1%}", f"{row['accuracy']:.1%}"]
        for run in runs
        for row in run.calibration
    ]  # fmt: skip
    head = ["Probability", *(["Run"] if len(runs) > 1 else []), "Tokens", "Mean", "Right"]
    body = chart("calibration", caption) + details(
        "The same as a table", table("Of the most probable token", head, rows, "figures")
    )
    spec = {"points": points, "x": "probability of the first guess", "y": "share that came",
            "calibration": True}  # fmt: skip
    return Section("calibration", "Calibration", body, {"calibration": spec})


LEVELS = 8  # of colour, a nat each; the last for all above


def held_out(runs: list[Run]) -> Section | None:
    """An excerpt of the validation split, coloured by loss; the script shows the guesses."""
    if len(runs) > 1:
        return None
    (run,) = runs
    tokens = [token for document in run.held_out for token in document["tokens"]]
    parts = []
    for document in run.held_out:
        spans = "".join(map(_token, document["tokens"]))
        end = "" if document["whole"] else '<p class="note">The document goes on.</p>'
        parts.append(f'<div class="document" dir="auto">{spans}</div>{end}')
    whole = all(document["whole"] for document in run.held_out)
    what = count(len(run.held_out), "whole document")
    mean = sum(token["loss_nats"] for token in tokens) / max(1, len(tokens))
    legend = "".join(
        f'<span class="q{level}">{level}{"+" if level == LEVELS - 1 else ""}</span>'
        for level in range(LEVELS)
    )
    body = f"""<p>{what if whole else "The beginning of a document"} that the model has not \
seen: {len(tokens):,} tokens, {mean:.2f} nats per token here. The colour is a token's loss. Point \
at one, tap it, or go from one to the next with the arrow keys: you see what the model expected \
there.</p>
<p class="legend"><span id="legend-title">Loss in nats</span> {legend}</p>
<div class="reader">
<div class="text" role="group" aria-label="Held-out text; arrow keys go from token to token">
{"".join(parts)}</div>
<div class="guesses" id="guesses" role="status" aria-live="polite"><p class="note">No token \
chosen.</p></div>
</div>"""
    data = [
        [token["name"], token["loss_nats"], [[name, p] for name, p in token["guesses"]]]
        for token in tokens
    ]
    return Section("held-out", "Held-out text", body, {"tokens": data})


def _token(token: dict[str, Any]) -> str:
    """A token as text; a piece of a character that is still to come as a dot."""
    level = min(LEVELS - 1, int(max(0.0, token["loss_nats"])))
    shown = text(token["text"]).replace("\n", '<i aria-hidden="true">↵</i>\n')
    return f'<span class="q{level}">{shown or "<i>·</i>"}</span>'


def samples(runs: list[Run]) -> Section:
    """Completions side by side: by temperature, and by run."""
    groups: dict[str, list[tuple[float, int, str]]] = {}
    for number, run in enumerate(runs):
        for sample in run.samples:
            found = groups.setdefault(sample["prompt"], [])
            found.append((sample["temperature"], number, sample["completion"]))
    parts = []
    for prompt, found in groups.items():
        figures = "".join(
            f"<figure><figcaption>Temperature {temperature:g}"
            f"{', ' + text(runs[number].name) if len(runs) > 1 else ''}</figcaption>"
            f'<pre dir="auto" tabindex="0"><b>{text(prompt)}</b>{text(completion)}</pre></figure>'
            for temperature, number, completion in sorted(found)
        )
        shown = text(prompt.strip() or "nothing")
        parts.append(
            f'<h3>After <code dir="auto">{shown}</code></h3><div class="samples">{figures}</div>'
        )
    return Section("samples", "Samples", "".join(parts))


def data(runs: list[Run]) -> Section:
    """What the text holds, by source and in all."""
    parts = []
    for run in runs:
        of = run.data
        sources = {**of["sources"], **({"all": of} if len(of["sources"]) > 1 else {})}
        rows = [
            [text(name), f"{part['documents']:,}", f"{part['bytes']:,}", f"{part['tokens']:,}",
             f"{part['valid']['tokens'] / max(1, part['tokens']):.1%}",
             f"{part['bytes_per_token']:.2f}", f"{part['longest_document_bytes']:,}",
             f"{part['vocabulary_used'] / of['vocabulary']:.1%}"]
            for name, part in sources.items()
        ]  # fmt: skip
        left_out = {"duplicate": of["duplicates"], **of["left_out"]}
        counted = [f"{count:,} {text(why)}" for why, count in left_out.items() if count]
        name = f"{text(run.name)}: " if len(runs) > 1 else ""
        caption = f"{name}{of['vocabulary']:,} tokens in the vocabulary" + (
            f"; left out: {', '.join(counted)}" if counted else ""
        )
        head = ["Source", "Documents", "Bytes", "Tokens", "Held out", "Bytes per token",
                "Longest document", "Vocabulary used"]  # fmt: skip
        parts.append(table(caption, head, rows, "figures"))
    return Section("data", "Data", "".join(parts))


PEAKS = {
    "matmul_flops_per_second": "what matrix products alone reach here",
    "data_sheet_flops_per_second": "the data sheet",
}


def plan(runs: list[Run]) -> Section | None:
    """What was predicted for the training, and what it took."""
    if len(runs) > 1:
        return None
    of = runs[0].performance
    if of is None:
        body = (
            '<p class="note">No clocks: this run was not the last training on this machine. '
            "They are in <code>metrics/performance.json</code> where it was.</p>"
        )
        return Section("plan", "Plan and measured", body)
    rows = []
    for name, words, form in (
        ("seconds", "Time of training", lambda value: duration(value)),
        ("memory_bytes", "Peak memory", lambda value: f"{value / 1e6:,.0f} MB"),
    ):
        predicted, measured = of[name]["predicted"], of[name]["measured"]
        known = predicted is not None
        rows.append([
            words,
            form(predicted) if known else "-",
            form(measured),
            f"{measured / predicted - 1:+.1%}" if known and predicted else "-",
        ])  # fmt: skip
    head = ["", "Predicted", "Measured", "Difference"]
    speed = [
        ("Tokens per second", f"{of['tokens_per_second']:,.0f}"),
        ("Median step", f"{of['step_seconds_median'] * 1e3:,.1f} ms"),
        ("Operations per token, forward and backward", f"{of['flops_per_token'] / 1e6:,.2f} MFLOP"),
        ("Matrix products alone", f"{of['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s"),
        ("Utilisation (MFU)", f"{of['mfu']:.1%} of {PEAKS.get(of['mfu_is_of'], '?')}"),
        ("Micro-batch", count(of["micro_batch_size"], "window")),
        ("Compiled", "yes" if of["compiled"] else "no"),
        ("Device", text(_devices(of))),
        ("Precision", text(of["dtype"])),
    ]
    body = table("Predicted before the training, and measured", head, rows, "figures") + table(
        "Speed", ["What", "Measured"], speed, "facts"
    )
    return Section("plan", "Plan and measured", body)


def _devices(of: dict[str, Any]) -> str:
    """The device, and how many of them trained."""
    several = of.get("num_devices", 1) > 1  # absent from before there could be several
    return f"{of['num_devices']} processes, each on {of['device']}" if several else of["device"]


def settings(runs: list[Run]) -> Section:
    """What decided the run; of two runs, what differs."""
    used = [_settings(run) for run in runs]
    if len(runs) > 1:
        names = {name: None for setting in used for name in setting}
        rows = [
            [f"<code>{text(name)}</code>", *(text(show(s.get(name, "-"))) for s in used)]
            for name in names
            if len({show(setting.get(name, "-")) for setting in used}) > 1
        ]
        head = ["Setting", *(text(run.name) for run in runs)]
        body = (
            table(f"{len(rows)} of {len(names)} settings differ", head, rows, "facts")
            if rows
            else "<p>Both runs have the same settings.</p>"
        )
        return Section("settings", "Settings that differ", body)
    (run,), (values,) = runs, used
    written, parts = flat(run.params), []
    for section in run.params:
        rows = []
        for name, value in values.items():
            if name.startswith(f"{section}."):
                cell = text(show(value))
                if name in written and written[name] != value:
                    cell += f' <span class="note">(params.yaml: {text(show(written[name]))})</span>'
                rows.append([f"<code>{text(name.partition('.')[2])}</code>", cell])
        parts.append(table(f"<code>{text(section)}</code>", ["Setting", "Value"], rows, "facts"))
    note = (
        '<p class="note">Model and training: what the model was trained with, as recorded '
        "beside it. The rest: params.yaml as it stands.</p>"
        if run.provenance
        else '<p class="note">params.yaml as it stands.</p>'
    )
    return Section("settings", "Settings", f'{note}<div class="columns">{"".join(parts)}</div>')


def _settings(run: Run) -> dict[str, Any]:
    """By section.key, model and training as recorded with the model."""
    recorded = {name: run.provenance[name] for name in ("model", "train") if run.provenance}
    return flat({**run.params, **recorded})


def provenance(runs: list[Run]) -> Section:
    """What made the run: commit, environment, inputs and code by their hashes."""
    parts = []
    for run in runs:
        of = run.provenance
        code = "as trained"
        if run.changed_code:
            code = f"changed since: {text(', '.join(run.changed_code))}"
        here = run.name == "workspace"
        facts = [
            ("Commit here" if here else "Commit", f"<code>{text(run.commit)}</code>"),
            *([("Code here", code)] if here else []),
            *((text(name.capitalize()), text(value)) for name, value in of["environment"].items()),
        ]
        name = f": {text(run.name)}" if len(runs) > 1 else ""
        parts.append(table(f"Made of{name}", ["What", "Which"], facts, "facts"))
        for kind, what in (("inputs", "input"), ("code", "code file")):
            rows = [
                (f"<code>{text(file)}</code>", f"<code>{text(sha256)}</code>")
                for file, sha256 in of[kind].items()
            ]
            hashes = table("SHA-256", ["File", "Hash"], rows, "facts hashes")
            parts.append(details(f"{count(len(rows), what)}{name}, by hash", hashes))
    return Section("provenance", "Provenance", "".join(parts))
