"""Text from a model: `python -m lm.generate --prompt "def "` streams a completion.

Past the context length the window moves on by half of it: the older half is forgotten and the
newer half is read again from position 0.
"""

import argparse
import codecs
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lm import rng
from lm.checkpoint import load_model
from lm.device import choose_device
from lm.errors import InputError, one_line_errors
from lm.model import TransformerLM
from lm.tokenizer import Tokenizer


@torch.inference_mode()
def generate(
    model: TransformerLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_id: int | None = None,
    end_id: int | None = None,
    seed: int = 0,
    use_cache: bool = True,
) -> Iterator[list[int | None]]:
    """Continue several prompts together, giving one new id per prompt at a time.

    A row gives None while a longer prompt than the shortest is still being read, and after it
    has ended, by `stop_id` or by length. A row depends on its number, not on the other prompts.
    Temperature 0 takes the most probable token. A model with intra-document masking has to know
    the `end_id` of its documents. Raises ValueError for an empty prompt.
    """
    if not all(prompts):
        raise ValueError("an empty prompt; begin with the end token instead")
    device, length = next(model.parameters()).device, model.config.context_length
    read = min(map(len, prompts))
    ids = torch.tensor([list(prompt[:read]) for prompt in prompts], device=device)  # (B, n)
    remaining = [max_new_tokens] * len(prompts)
    caches, cached_from = model.new_caches(len(prompts)), 0
    while any(remaining):
        start = _window_start(ids.shape[1], length)
        documents = model.documents(ids[:, start:], end_id)
        if not use_cache:
            logits = model(ids[:, start:], documents=documents)[:, -1]  # (B, V)
        else:
            if start != cached_from:
                caches, cached_from = model.new_caches(len(prompts)), start
            logits = model(ids[:, start + caches[0].length :], caches, documents)[:, -1]
        position = ids.shape[1]
        draws = [
            rng.random_uniforms(rng.seed(seed, "generate", row, position - len(prompt)), 1)[0]
            for row, prompt in enumerate(prompts)
        ]
        sampled = sample(logits, temperature, top_k, top_p, torch.tensor(draws)).tolist()
        new: list[int | None] = [None] * len(prompts)
        for row, prompt in enumerate(prompts):
            if position < len(prompt):
                sampled[row] = prompt[position]
            elif remaining[row]:
                new[row] = sampled[row]
                remaining[row] = 0 if sampled[row] == stop_id else remaining[row] - 1
        ids = torch.cat([ids, torch.tensor(sampled, device=device)[:, None]], dim=1)
        yield new


def _window_start(n_tokens: int, context_length: int) -> int:
    """The first of n tokens that the model still sees."""
    if n_tokens <= context_length:
        return 0
    half = max(1, context_length // 2)
    return -(-(n_tokens - context_length) // half) * half


def sample(
    logits: Float[Tensor, "B V"],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    draws: Float[Tensor, " B"],
) -> Int[Tensor, " B"]:
    """One id per row: the inverse of the cumulative distribution at draws in [0, 1).

    Top-k keeps the k most probable ids; top-p the fewest whose probabilities reach p (Holtzman
    et al. 2020).
    """
    if temperature == 0:
        return logits.argmax(dim=-1).cpu()
    probabilities = torch.softmax(logits.cpu().double() / temperature, dim=-1)
    probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)  # (B, V)
    if top_k is not None:
        probabilities[:, top_k:] = 0
    if top_p is not None:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities[before >= top_p] = 0
    cumulative = probabilities.cumsum(dim=-1)
    targets = draws.double()[:, None] * cumulative[:, -1:]
    places = torch.searchsorted(cumulative, targets, right=True)
    return order.gather(1, places.clamp(max=logits.shape[1] - 1)).squeeze(1)


def complete(
    model: TransformerLM, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, **options: object
) -> Iterator[str]:
    """The text that follows a prompt, piece by piece, up to the end token."""
    ids = tokenizer.encode(prompt) or [tokenizer.end_id]
    characters = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside one
    end_id = tokenizer.end_id
    steps = generate(model, [ids], max_new_tokens, stop_id=end_id, end_id=end_id, **options)  # type: ignore[arg-type]
    for (new,) in steps:
        if new is not None and new != end_id:
            yield characters.decode(tokenizer.decode_bytes([new]))
    yield characters.decode(b"", final=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m lm.generate", description="Complete a prompt.")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: most probable token")
    parser.add_argument("--top-k", type=int, help="keep the k most probable tokens")
    parser.add_argument("--top-p", type=float, help="keep the tokens that make up this probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=Path("models/model"), help="its folder")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    options = parser.parse_args(arguments)
    with one_line_errors():
        for holds, name, bound in (
            (options.max_new_tokens >= 1, "max-new-tokens", ">= 1"),
            (0 <= options.temperature < float("inf"), "temperature", ">= 0"),
            (options.top_k is None or options.top_k >= 1, "top-k", ">= 1"),
            (options.top_p is None or 0 < options.top_p <= 1, "top-p", "in (0, 1]"),
        ):
            if not holds:
                raise InputError(f"--{name}: must be {bound}")
        try:
            options.prompt.encode()
        except UnicodeEncodeError:
            raise InputError("--prompt: not UTF-8") from None
        model, tokenizer = load_model(options.model, choose_device(options.device))
        sys.stdout.write(options.prompt)
        for text in complete(
            model,
            tokenizer,
            options.prompt,
            options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
        ):
            sys.stdout.write(text)
            sys.stdout.flush()
        print()


if __name__ == "__main__":
    main()
