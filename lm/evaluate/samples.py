"""Samples: what the model writes after each prompt at each temperature."""

import time
from collections.abc import Iterable
from itertools import product
from typing import NamedTuple

from lm.base.console import say
from lm.base.settings import EvaluateConfig
from lm.base.tables import plain
from lm.data.tokenizer import Tokenizer
from lm.generate.stream import complete
from lm.model.transformer import TransformerLM

REPORT_SECONDS = 10  # between two lines on the console


class Sample(NamedTuple):
    """A completion and how it was drawn."""

    prompt: str
    temperature: float
    completion: str


def draw_samples(
    model: TransformerLM, tokenizer: Tokenizer, config: EvaluateConfig
) -> list[Sample]:
    """Complete every prompt at every temperature, one after the other."""
    wanted = list(product(config.prompts, config.temperatures))
    samples: list[Sample] = []
    reported = time.monotonic()
    for prompt, temperature in wanted:
        pieces = complete(
            model,
            tokenizer,
            prompt,
            config.max_new_tokens,
            temperature=temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
        )
        samples.append(Sample(prompt, temperature, "".join(pieces)))
        if time.monotonic() - reported >= REPORT_SECONDS:
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
    """Return a text as a block of Markdown in which nothing of it has a meaning."""
    lines = [f"    {line}".rstrip() for line in plain(text).rstrip().split("\n")]
    return "\n".join([f"{head}:", "", *lines, "", ""])
