"""Draw samples from a model; write them and the summary of an evaluation as Markdown."""

import sys
import time
from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any, NamedTuple

from tqdm import tqdm

from lm.base.console import say
from lm.base.settings import EvaluateConfig
from lm.base.tables import loss_table, plain
from lm.data.tokenizer import Tokenizer
from lm.generate.stream import stream
from lm.model.transformer import TransformerLM

REPORT_SECONDS = 10  # between two lines in a log


class Sample(NamedTuple):
    """A completion and how it was drawn."""

    prompt: str
    temperature: float
    completion: str


def draw_samples(
    model: TransformerLM, tokenizer: Tokenizer, config: EvaluateConfig
) -> list[Sample]:
    """Complete every prompt at every temperature, one after the other."""
    samples = []
    wanted, reported = list(product(config.prompts, config.temperatures)), time.monotonic()
    for prompt, temperature in tqdm(wanted, unit="sample", leave=False, disable=None):
        chunks = stream(
            model,
            tokenizer,
            [prompt],
            config.max_new_tokens,
            temperature=temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
        )
        samples.append(Sample(prompt, temperature, "".join(chunk.text for chunk in chunks)))
        if not sys.stderr.isatty() and time.monotonic() - reported >= REPORT_SECONDS:
            reported = time.monotonic()
            say(f"{len(samples):,} of {len(wanted):,} samples")
    return samples


def samples_as_markdown(samples: Iterable[Sample]) -> str:
    """Return prompts, temperatures and completions as Markdown."""
    return "".join(
        as_block(f"Prompt `{s.prompt}`, temperature {s.temperature:g}", s.prompt + s.completion)
        for s in samples
    )


def as_block(head: str, text: str) -> str:
    """Return a text as a code block of Markdown, which shows every character as it is."""
    lines = [f"    {line}".rstrip() for line in plain(text).rstrip().split("\n")]
    return "\n".join([f"{head}:", "", *lines, "", ""])


def summary(
    metrics: Mapping[str, Any],
    baselines: Mapping[str, float],
    sample: Sample,
    places: Mapping[str, str],
    remarks: Iterable[str],
) -> str:
    """Return the losses, a sample and the places of all results, as Markdown."""
    lines = [
        loss_table(metrics, baselines),
        *(f"Warning: {remark}\n" for remark in remarks),
        as_block(f"Prompt `{sample.prompt}`", sample.prompt + sample.completion),
        *(f"{name:<12} {place}" for name, place in places.items()),
    ]
    return "\n".join(lines) + "\n"
