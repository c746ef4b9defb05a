"""Measure tokens per second of generation, beside `generate` of transformers.

    python -m benchmarks.generate [--shapes default L] [--batches 1 16]

One process, greedy, prompts of 8 ids, caches on both sides, in turns; medians count. The other side
is LlamaForCausalLM with the same weights and its default settings. The last column is the number of
tokens for which all rows of both agree: the order of sums may decide a near tie of random weights.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lm.base.errors import one_line_errors
from lm.base.params import load_params
from lm.base.sections import read_section
from lm.generate.stream import generate
from lm.machine.device import describe
from lm.model.huggingface import stock_config, stock_weights
from lm.model.transformer import ModelConfig, TransformerLM

PROMPT = 8  # ids
SHAPES = {  # of params.yaml but for these
    "default": {},
    "L": {"vocab_size": 10_000, "d_model": 512, "num_heads": 16, "d_ff": 1344},
    "GPT-2": {"vocab_size": 50_304, "context_length": 1024, "d_model": 768, "num_layers": 12,
              "num_heads": 12, "d_ff": 2048},
}  # fmt: skip
Side = Callable[[list[list[int]]], list[list[int]]]


def ours(model: TransformerLM, n_tokens: int) -> Side:
    def run(prompts: list[list[int]]) -> list[list[int]]:
        steps = [
            [token.id for token in tokens if token]
            for tokens in generate(model, prompts, n_tokens, temperature=0)
        ]
        return [list(row) for row in zip(*steps, strict=True)]

    return run


def theirs(model: Any, n_tokens: int) -> Side:
    def run(prompts: list[list[int]]) -> list[list[int]]:
        ids = torch.tensor(prompts)
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=n_tokens, do_sample=False)
        return out[:, PROMPT:].tolist()

    return run


def as_llama(model: TransformerLM) -> Any:
    """Return the same weights in transformers; no token ends a text."""
    settings = stock_config(model.config, 0) | {"bos_token_id": None, "eos_token_id": None}
    llama = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).eval()
    llama.load_state_dict(stock_weights(model))
    return llama


def compare(sides: list[Side], batch: int, vocab_size: int, rounds: int) -> tuple[list[float], int]:
    """Return the median seconds of each side, and the number of tokens for which all rows agree."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocab_size, (batch, PROMPT), generator=generator).tolist()
    first, second = (side(prompts) for side in sides)  # not counted
    same = [
        a == b for a, b in zip(zip(*first, strict=True), zip(*second, strict=True), strict=True)
    ]
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, taken in zip(sides, seconds, strict=True):
            start = time.perf_counter()
            side(prompts)
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds], [*same, False].index(False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["default", "L"], choices=SHAPES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--tokens", type=int, default=128, help="new tokens in each row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with one_line_errors():
        torch.set_num_threads(options.threads)
        print(f"{describe(torch.device('cpu'))}, torch {torch.__version__}\n")
        print("| shape | batch | ours tokens/s | transformers tokens/s | ratio | same tokens |")
        print("|---|--:|--:|--:|--:|--:|")
        for name in options.shapes:
            params = load_params(Path("params.yaml"))
            params["model"] |= {"vocab_size": params["tokenizer"]["vocab_size"]} | SHAPES[name]
            torch.manual_seed(0)
            model = TransformerLM(read_section(ModelConfig, params, "model")).eval()
            sides = [ours(model, options.tokens), theirs(as_llama(model), options.tokens)]
            for batch in options.batches:
                seconds, same = compare(sides, batch, model.config.vocab_size, options.rounds)
                speeds = [batch * options.tokens / s for s in seconds]
                print(
                    f"| {name} | {batch} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | "
                    f"{speeds[0] / speeds[1]:.2f} | {same} of {options.tokens} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
