"""Write the model card: card.md, filled in with the recorded provenance, metrics and samples."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any
from unicodedata import bidirectional

from lm.base.sections import Bound
from lm.base.tables import data_table, loss_table

TEMPLATE = Path(__file__).with_name("card.md")
# lm.export writes a folder again if its card has this line
MARK = "<!-- Written by lm.export, which replaces it. To edit it, delete this line. -->"
TEXT_LICENSES = "TEXT_LICENSES.txt"  # beside the card
LICENSE = Bound(lambda x: x.replace("-", "").replace(".", "").isalnum() and x.isascii(),
                "must be an identifier of the Hub, as apache-2.0, or null")  # fmt: skip


@dataclass(frozen=True)
class ExportConfig:
    """The section `export`."""

    license: Annotated[Annotated[str, LICENSE] | None, "stands in the model card; null: unknown"]


@dataclass(frozen=True)
class Results:
    """The results of the pipeline: metrics/*.json, samples.md, curves.csv, data/*."""

    data: Mapping[str, Any]
    train: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    samples: str
    curves: str
    corpus: list[dict[str, Any]] | None  # None: the user's own text
    licenses: str  # of the corpus: a line for each, an empty one, the texts; else empty


def card(
    provenance: Mapping[str, Any],
    weights_sha256: str,
    end_token: str,
    terms: str | None,
    why_no_weights: str | None,
    results: Results | None,
) -> str:
    """Return the page; without `results` it shows the provenance alone."""
    inputs = {n: h for n, h in provenance["inputs"].items() if not n.endswith(".bin")}
    return _template().render(
        provenance=provenance,
        model=provenance["model"],
        hashes=inputs | {"models/model/model.safetensors": weights_sha256},
        environment=", ".join(f"{name} {v}" for name, v in provenance["environment"].items()),
        origin=provenance["train"].get("init_from"),
        end_token=end_token,
        terms=terms,
        text_licenses=TEXT_LICENSES,
        why_no_weights=why_no_weights,
        mark=MARK,
        results=results,
        **({} if results is None else _measured(results)),
    )


@cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined  # slow: each stage's check imports this module

    environment = Environment(
        autoescape=False,  # noqa: S701 - Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "grouped": "{:,}".format,  # 1,234
        "in_words": in_words,
        "repr": repr,
        "yaml": lambda value: value if isinstance(value, str) else json.dumps(value),
    }
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _measured(results: Results) -> dict[str, Any]:
    """Return the values of the template that are computed from the results."""
    first_prompt = re.match(r"Prompt `(.+?)`, temperature", results.samples, re.DOTALL)
    return {
        "prompt": first_prompt[1] if first_prompt else "The",
        "passes": results.train["tokens"] / results.data["train"]["tokens"],
        "loss_table": loss_table(results.evaluation, results.evaluation["baseline_loss_nats"]),
        "samples": aligned(results.samples).rstrip("\n"),
        "licenses": results.licenses.partition("\n\n")[0].splitlines(),
        "data_table": data_table(results.data).rstrip("\n"),
    }


def in_words(number: int) -> str:
    """Return 1.32 million for 1315968."""
    for size, name in ((10**9, " billion"), (10**6, " million"), (10**3, " thousand")):
        if number >= size:
            return f"{number / size:.3g}{name}"
    return str(number)


def aligned(samples: str) -> str:
    """Frame the indented blocks that have text from right to left, so that browsers align it."""

    def framed(block: re.Match[str]) -> str:
        leftwards = any(bidirectional(character) in ("R", "AL") for character in block[0])
        return f'<div dir="auto">\n\n{block[0]}\n\n</div>' if leftwards else block[0]

    return re.sub(r"^ {4}.*(?:\n+ {4}.*)*", framed, samples, flags=re.MULTILINE)
