"""The model card: what a stranger should know of a model, from what is recorded of it (Markdown).

provenance, metrics, samples --card--> README.md         curves --loss_curve--> loss.svg
"""

import csv
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, Any
from unicodedata import bidirectional

from lm.base.config import Bound
from lm.base.errors import InputError
from lm.base.tables import data_table, loss_table

# its presence allows lm.export.folder to write the folder again
MARK = "<!-- Written by lm.export.folder, which replaces it. To edit it, delete this line. -->"
CURVE_POINTS = 100  # of the training loss, averaged
VEGA_LITE = "6.4"
BLUE, ORANGE = "#4c78a8", "#f58518"
LICENSE = Bound(lambda x: x.replace("-", "").replace(".", "").isalnum() and x.isascii(),
                "must be an identifier of the Hub, as apache-2.0, or null")  # fmt: skip


@dataclass(frozen=True)
class ExportConfig:
    """The section `export`."""

    license: Annotated[Annotated[str, LICENSE] | None, "stands in the model card; null: unknown"]


@dataclass(frozen=True)
class Results:
    """What the pipeline measured: metrics/*.json, samples.md, curves.csv, data/corpus.json."""

    data: Mapping[str, Any]
    train: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    samples: str
    curves: str
    corpus: list[dict[str, Any]] | None  # None: the user's own text


def card(
    provenance: Mapping[str, Any],
    weights_sha256: str,
    end_token: str,
    terms: str | None,
    why_no_weights: str | None,
    results: Results | None,
) -> str:
    """The whole page. Without `results` it tells what the provenance alone knows."""
    model = provenance["model"]
    sections = [
        _front_matter(terms) + "\n" + MARK,
        _summary(provenance, results),
        _use(model, why_no_weights, end_token, _first_prompt(results)),
        *(_measured(results) if results else []),
        _recipe(provenance, end_token),
        _again(provenance, weights_sha256),
        _limits(provenance, terms, results),
    ]
    return "\n\n".join(section.strip("\n") for section in sections) + "\n"


def _front_matter(terms: str | None) -> str:
    """What the Hub indexes. It knows the licence "unknown"; a language nobody determined."""
    keys = {
        "license": terms or "unknown",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    return "\n".join(["---", *(f"{key}: {value}" for key, value in keys.items()), "---"])


def _summary(provenance: Mapping[str, Any], results: Results | None) -> str:
    model, train = provenance["model"], provenance["train"]
    origin = train.get("init_from")
    begun = f"continued from the weights of `{origin}`" if origin else "trained from random weights"
    size = f"{model['num_layers']} layers of width {model['d_model']}"
    if results is None:
        return f"# A Transformer of {size}\n\nA language model, {begun}. It continues text."
    steps, tokens = results.train["step"], results.train["tokens"]
    evaluation, passes = results.evaluation, tokens / results.data["train"]["tokens"]
    bits = evaluation["bits_per_byte"]
    best = results.train["best_step"]
    chosen = f" The weights are of step {best:,}, the best in validation." * bool(
        train.get("early_stopping")
    )
    return "\n".join(
        [
            f"# A Transformer of {_short(results.train['parameters'])} parameters",
            "",
            f"A language model, {begun}: {steps:,} steps, {tokens:,} tokens, {passes:.2g} passes",
            f"through its text. On held-out text it needs {bits:.4f} bits per byte. It continues",
            f"text; it was not taught to answer questions or to follow instructions.{chosen}",
        ]
    )


def _short(number: int) -> str:
    """1315968 is 1.3 million."""
    for size, name in ((10**9, " billion"), (10**6, " million"), (10**3, " thousand")):
        if number >= size:
            return f"{number / size:.3g}{name}"
    return str(number)


def _first_prompt(results: Results | None) -> str:
    """One that suits the text: the first of samples.md."""
    found = (
        re.match(r"Prompt `(.+?)`, temperature", results.samples, re.DOTALL) if results else None
    )
    return found[1] if found else "The"


def _use(model: Mapping[str, Any], why_no_weights: str | None, end_token: str, prompt: str) -> str:
    if why_no_weights:
        return (
            f"## Use\n\nThere are no weights in this folder: {why_no_weights}. In the project that "
            "made it\n`python -m lm.generate` runs it."
        )
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer({prompt!r}, return_tensors="pt")
ids = model.generate(**prompt, max_new_tokens=100, do_sample=True, temperature=0.8)
print(tokenizer.decode(ids[0]))
```

It sees {model["context_length"]:,} tokens at a time. `{end_token}` in a prompt is plain text; the
token itself is `tokenizer.eos_token_id`. It ends every document, and no other token begins one."""


def _measured(results: Results) -> list[str]:
    evaluation, data = results.evaluation, results.data
    table = loss_table(evaluation, evaluation["baseline_loss_nats"])
    sides = [
        f"{data[side]['documents']:,} documents, {data[side]['bytes']:,} bytes, "
        f"{data[side]['tokens']:,} tokens"
        for side in ("train", "valid")
    ]
    return [
        f"## Results\n\n{table}\n![Loss by training tokens](loss.svg)",
        f"## Samples\n\nNot chosen by anyone; the first line of each begins with the prompt.\n\n"
        f"{aligned(results.samples)}",
        f"## Data\n\nTraining: {sides[0]}.\nHeld out: {sides[1]}.\n\n{data_table(data)}"
        f"{_corpus(results.corpus)}",
    ]


def aligned(samples: str) -> str:
    """Indented blocks with text that runs from right to left, in frames that let it."""

    def framed(block: re.Match[str]) -> str:
        leftwards = any(bidirectional(character) in ("R", "AL") for character in block[0])
        return f'<div dir="auto">\n\n{block[0]}\n\n</div>' if leftwards else block[0]

    return re.sub(r"^ {4}.*(?:\n+ {4}.*)*", framed, samples, flags=re.MULTILINE)


def _corpus(corpus: list[dict[str, Any]] | None) -> str:
    """Where the default text comes from; of the user's own nothing is known but its hash."""
    if corpus is None:
        return ""
    lines = ["", "| made from | bytes | sha256 of the text |", "|---|---:|---|"]
    for entry in corpus:
        name = f"{entry['package']} {entry.get('version', '')}" if "package" in entry else "grammar"
        lines.append(f"| {name} | {entry['bytes']:,} | `{entry['sha256']}` |")
    return "\n".join(lines)


def _recipe(provenance: Mapping[str, Any], end_token: str) -> str:
    vocab_size = provenance["model"]["vocab_size"]
    settings = [
        line
        for section in ("model", "train")
        for line in (f"{section}:", *(f"  {k}: {_yaml(v)}" for k, v in provenance[section].items()))
    ]
    return "\n".join(
        [
            "## Model, tokenizer and training",
            "",
            "Llama's architecture (pre-norm, RMSNorm, rotary positions, SwiGLU, no biases), unless",
            f"the settings below depart from it. Byte-level tokenizer of {vocab_size:,} ids,",
            f"`{end_token}` among them; no text is unknown to it and none is altered.",
            "",
            "```yaml",
            *settings,
            "```",
        ]
    )


def _again(provenance: Mapping[str, Any], weights_sha256: str) -> str:
    inputs = {n: h for n, h in provenance["inputs"].items() if not n.endswith(".bin")}
    hashes = inputs | {"models/model/model.safetensors": weights_sha256}
    environment = ", ".join(f"{name} {value}" for name, value in provenance["environment"].items())
    return "\n".join(
        [
            "## To make it again",
            "",
            "In a clone of the project whose code has the hashes in `provenance.json`:",
            "",
            "    make repro               # text, tokens, model, metrics, this folder",
            "    python -m tools.verify      # every byte hashed again",
            "",
            "The same environment gives the same bytes, another one the same results to rounding.",
            f"This one was made with {environment}.",
            "",
            "| file | sha256 |",
            "|---|---|",
            *(f"| `{name}` | `{sha256}` |" for name, sha256 in hashes.items()),
        ]
    )


def _limits(provenance: Mapping[str, Any], terms: str | None, results: Results | None) -> str:
    known = f"{_short(results.data['train']['bytes'])} bytes of text" if results else "its text"
    if origin := provenance["train"].get("init_from"):
        known += f" and what `{origin}` had learnt"
    context_length = provenance["model"]["context_length"]
    stated = f"`{terms}`." if terms else "Nobody has stated one: ask before you use it."
    return "\n".join(
        [
            "## Limits",
            "",
            f"- It knows nothing beyond {known}, and repeats the errors and biases in it.",
            "- What it states, names and quotes is made up, however well it reads.",
            f"- Nothing before the last {context_length:,} tokens reaches it.",
            "- It was measured by its loss on held-out text of the same kind, and by nothing else.",
            "",
            "## Licence",
            "",
            f"{stated} That of the text it was trained on may bind you, too.",
        ]
    )


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def loss_curve(curves: str, font: str = "sans-serif") -> str:
    """Training and validation loss by tokens, of a curves.csv, as SVG.

    Every size is given, so that nothing is laid out by the fonts of this machine, and the bytes
    depend on the curves alone.
    """
    columns = ("tokens", "train_loss", "valid_loss")
    try:
        rows = [{k: float(row[k]) for k in columns} for row in csv.DictReader(curves.splitlines())]
    except (KeyError, TypeError, ValueError, csv.Error):
        raise InputError("metrics/curves.csv: not a table of numbers; run `dvc repro`") from None
    trained = [row for row in rows if math.isfinite(row["train_loss"])]
    size = -(-len(trained) // CURVE_POINTS) or 1
    groups = [trained[i : i + size] for i in range(0, len(trained), size)]
    points = [
        {
            "tokens": fmean(row["tokens"] for row in group),
            "loss": fmean(row["train_loss"] for row in group),
            "of": "training",
        }
        for group in groups
    ]
    points += [
        {"tokens": row["tokens"], "loss": row["valid_loss"], "of": "validation"}
        for row in rows
        if math.isfinite(row["valid_loss"])
    ]
    axis = {"labelOverlap": False, "labelFlush": False, "tickCount": 5, "titleFontWeight": "normal"}
    names = [
        {
            "data": {"values": [{}]},
            "mark": {"type": "text", "text": name, "color": color, "x": 590, "y": y,
                     "align": "right", "fontSize": 12},
        }
        for name, color, y in (("training", BLUE, 12), ("validation", ORANGE, 30))
    ]  # fmt: skip
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": 600, "height": 280, "autosize": "none", "background": "white",
        "padding": {"left": 55, "right": 20, "top": 10, "bottom": 45},
        "layer": [
            {
                "data": {"values": points},
                "mark": {"type": "line", "strokeWidth": 1.5},
                "encoding": {
                    "x": {"field": "tokens", "type": "quantitative", "title": "training tokens",
                          "axis": axis | {"format": "~s", "titleY": 34}},
                    "y": {"field": "loss", "type": "quantitative", "title": "nats per token",
                          "scale": {"zero": False}, "axis": axis | {"titleX": -40}},
                    "color": {"field": "of", "type": "nominal", "legend": None,
                              "scale": {"domain": ["training", "validation"],
                                        "range": [BLUE, ORANGE]}},
                },
            },
            *names,
        ],
        "config": {"font": font, "view": {"stroke": None}, "axis": {"gridColor": "#e8e8e8"}},
    }  # fmt: skip
    import vl_convert  # takes 0.1 s, which every stage's check of settings would wait for

    return vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE) + "\n"
