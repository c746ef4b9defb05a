"""Text from a model: `python -m lm.generate --prompt "def "` streams a completion.

    prompts -encode-> ids -generate-> Sampled, one a row and step -stream-> Piece, text to show

Past the context length the window moves on by half of it: the older half is forgotten and the
newer half is read again from position 0.
"""

import argparse
import codecs
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lm.base import rng
from lm.base.errors import EnvironmentFault, InputError, one_line_errors
from lm.data.tokenizer import Tokenizer
from lm.generate.decoder import Decoder, memory_bytes
from lm.machine.device import Dtype, choose_device
from lm.machine.gauges import free_memory_bytes
from lm.model.model_folder import load_model
from lm.model.transformer import TransformerLM

STDIN = Path("-")
DRAWS = 256  # random numbers that a row makes at a time
COLD = 1e-12  # below this temperature the most probable token is sure, and logits / it overflow


class Sampled(NamedTuple):
    """A new token. Log-probabilities, in nats, are of the model's own distribution.

    That is the one before temperature, top-k and top-p. They are there if they were asked for.
    """

    id: int
    logprob: float = math.nan
    top: tuple[tuple[int, float], ...] = ()  # the most probable ids, in order


class Sampling(TypedDict, total=False):
    """How the next token is computed and chosen: options of `generate`."""

    temperature: float | Sequence[float]
    top_k: int | None
    top_p: float | None
    seed: int
    dtype: Dtype


Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """Some of a completion: whole characters, and no part of a stop text.

    The pieces of a row hold all of its tokens, those of a stop text and the end token included.
    """

    row: int
    text: str
    tokens: list[Sampled]
    finish_reason: Reason | None = None  # of the last: a stop text or the end token; max_new_tokens


def generate(
    model: TransformerLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_id: int | None = None,
    end_id: int | None = None,
    seed: int = 0,
    dtype: Dtype = "float32",
    top_logprobs: int | None = None,
) -> Iterator[list[Sampled | None]]:
    """Continue several prompts together, by one new token a row at a time.

    A row gives None after it has ended, by `stop_id` or by length. It depends on the seed and its
    number, not on the other prompts. Temperature 0 takes the most probable token; several are of
    the rows. With `top_logprobs` a token has its log-probability, and so many of the most probable
    ids have theirs. A model with intra-document masking has to know the `end_id` of its documents.
    Raises ValueError for an empty prompt, EnvironmentFault if the rows do not fit into memory.
    """
    if not all(prompts):
        raise ValueError("an empty prompt; begin with the end token instead")
    device, length = next(model.parameters()).device, model.config.context_length
    require_memory(model, len(prompts), max(map(len, prompts), default=0), dtype)
    temperatures = _per_row(temperature, len(prompts), device)
    histories = [list(prompt) for prompt in prompts]
    ended = [False] * len(prompts)
    decoder = Decoder(model, len(prompts), end_id, getattr(torch, dtype))
    logits = decoder.read(range(len(prompts)), [_window(ids, length) for ids in histories])
    for number, draws in enumerate(islice(_draws(seed, len(prompts)), max_new_tokens), start=1):
        ids = sample(logits, temperatures, top_k, top_p, draws)
        tokens = _sampled(logits, ids, top_logprobs)
        yield [None if end else token for token, end in zip(tokens, ended, strict=True)]
        ended = [end or token.id == stop_id for token, end in zip(tokens, ended, strict=True)]
        if all(ended) or number == max_new_tokens:
            return
        for history, token in zip(histories, tokens, strict=True):
            history.append(token.id)
        full = [row for row, taken in enumerate(decoder.lengths) if taken == length]
        logits = decoder.step(ids)
        if full:
            windows = [_window(histories[row], length) for row in full]
            rows = torch.tensor(full, device=device)
            logits = logits.index_copy(0, rows, decoder.read(full, windows))


def require_memory(model: TransformerLM, n_rows: int, longest: int, dtype: Dtype) -> None:
    """Raise EnvironmentFault if so many rows, with prompts of up to `longest` ids, do not fit."""
    length = model.config.context_length
    needed = memory_bytes(model, n_rows, min(longest, length), getattr(torch, dtype))
    free = free_memory_bytes(next(model.parameters()).device)
    if free is not None and needed > free:
        raise EnvironmentFault(
            f"{n_rows:,} completions at once need {needed / 1e6:,.0f} MB for what the model "
            f"remembers of up to {length:,} tokens each; {free / 1e6:,.0f} MB are free: ask for "
            "fewer at once"
        )


def _window(ids: Sequence[int], context_length: int) -> Sequence[int]:
    """What the model still sees of the ids."""
    if len(ids) <= context_length:
        return ids
    half = max(1, context_length // 2)
    return ids[-(-(len(ids) - context_length) // half) * half :]


def _per_row(
    temperature: float | Sequence[float], n_rows: int, device: torch.device
) -> Float[Tensor, " B"] | None:
    """The temperature of each row, where float64 is; None if all take the most probable token."""
    values = [temperature] * n_rows if isinstance(temperature, int | float) else temperature
    if len(values) != n_rows:
        raise ValueError(f"{len(values)} temperatures for {n_rows} prompts")
    where = "cpu" if device.type == "mps" else device
    return torch.tensor(values, device=where) if any(values) else None


def _draws(seed: int, n_rows: int) -> Iterator[Float[Tensor, " B"]]:
    """Without end, a number in [0, 1) for each row; a function of seed, row and place."""
    block = 0
    while True:
        rows = [rng.seed(seed, "generate", row, block) for row in range(n_rows)]
        numbers = [torch.from_numpy(rng.random_uniforms(key, DRAWS)) for key in rows]
        yield from torch.stack(numbers, dim=1)
        block += 1


def sample(
    logits: Float[Tensor, "B V"],
    temperatures: Float[Tensor, " B"] | None,
    top_k: int | None,
    top_p: float | None,
    draws: Float[Tensor, " B"],
) -> Int[Tensor, " B"]:
    """One id per row: the inverse of the cumulative distribution at draws in [0, 1).

    Top-k keeps the k most probable ids; top-p the fewest whose probabilities reach p (Holtzman
    et al. 2020), after top-k. No temperatures, or one of 0: the most probable id.
    """
    best = logits.max(dim=-1).indices  # (B,); argmax takes several times as long
    if temperatures is None:
        return best
    logits, draws = (t.to(temperatures.device) for t in (logits, draws))
    order = None
    if top_k is not None or top_p is not None:  # the most probable first
        k = logits.shape[1] if top_k is None else min(top_k, logits.shape[1])
        logits, order = logits.topk(k)  # (B, k)
    hot = temperatures > COLD
    probabilities = torch.softmax(logits.double() / temperatures.where(hot, 1.0)[:, None], dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    if top_p is not None:
        before = cumulative - probabilities
        cumulative = probabilities.masked_fill(before >= top_p, 0.0).cumsum(dim=-1)
    targets = draws.double()[:, None] * cumulative[:, -1:]
    places = torch.searchsorted(cumulative, targets, right=True)  # (B, 1)
    places = places.clamp(max=logits.shape[1] - 1)
    chosen = places if order is None else order.gather(1, places)
    return torch.where(hot, chosen.squeeze(1), best.to(hot.device)).to(best.device)


def _sampled(
    logits: Float[Tensor, "B V"], ids: Int[Tensor, " B"], top_logprobs: int | None
) -> list[Sampled]:
    """The new ids, with log-probabilities if they are asked for."""
    if top_logprobs is None:
        return [Sampled(i) for i in ids.tolist()]
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    values, places = logprobs.topk(min(top_logprobs, logits.shape[1]))  # (B, n)
    tops = [
        tuple(zip(*row, strict=True)) for row in zip(places.tolist(), values.tolist(), strict=True)
    ]
    chosen = logprobs.gather(1, ids[:, None]).squeeze(1)
    return list(map(Sampled, ids.tolist(), chosen.tolist(), tops))


@dataclass
class Completion:
    """A text on its way, and what of it may not be shown yet."""

    stop: Sequence[str]
    held: str = ""  # might begin a stop text
    tokens: list[Sampled] = field(default_factory=list)  # since the last piece
    characters: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )  # a token may end inside of a character

    def take(self, data: bytes, final: bool) -> tuple[str, bool]:
        """Text that can be shown now, and whether a stop text has come: it begins after that."""
        text = self.held + self.characters.decode(data, final)
        ends = [(text.find(s) + len(s), text.find(s)) for s in self.stop if s in text]
        if ends:
            return text[: min(ends)[1]], True  # of the first that is complete, the longest
        n_held = 0 if final else max((_overlap(text, s) for s in self.stop), default=0)
        self.held = text[len(text) - n_held :]
        return text[: len(text) - n_held], False


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text begin a stop text."""
    return max(n for n in range(min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))


def stream(
    model: TransformerLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int,
    *,
    stop: Sequence[str] = (),
    top_logprobs: int | None = None,
    **sampling: Unpack[Sampling],
) -> Iterator[Piece]:
    """Complete several prompts together, piece by piece, each as soon as its text is certain.

    A row ends at the end token, before the first stop text to be complete, or at max_new_tokens.
    A prompt is text or ids; an empty one begins with the end token. Stop texts must not be empty.
    """
    end_id = tokenizer.end_id
    ids = [(tokenizer.encode(p) if isinstance(p, str) else p) or [end_id] for p in prompts]
    going = {row: Completion(stop) for row in range(len(prompts))}
    steps = generate(
        model,
        ids,
        max_new_tokens,
        stop_id=end_id,
        end_id=end_id,
        top_logprobs=top_logprobs,
        **sampling,
    )
    for number, tokens in enumerate(steps, start=1):
        for row, completion in list(going.items()):
            token = tokens[row]
            assert token is not None
            completion.tokens.append(token)
            ended = token.id == end_id
            final = ended or number == max_new_tokens
            data = b"" if ended else tokenizer.decode_bytes([token.id])
            text, stopped = completion.take(data, final)
            reason: Reason | None = "stop" if ended or stopped else "length" if final else None
            if text or reason:
                yield Piece(row, text, completion.tokens, reason)
                completion.tokens = []
            if reason:
                del going[row]
        if not going:
            return


def complete(
    model: TransformerLM,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    stop: Sequence[str] = (),
    **sampling: Unpack[Sampling],
) -> Iterator[str]:
    """The text that follows a prompt, piece by piece; see `stream`."""
    for piece in stream(model, tokenizer, [prompt], max_new_tokens, stop=stop, **sampling):
        yield piece.text


def complete_many(
    model: TransformerLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    stop: Sequence[str] = (),
    **sampling: Unpack[Sampling],
) -> list[str]:
    """The texts that follow several prompts, whole; see `stream`."""
    texts = [""] * len(prompts)
    for piece in stream(model, tokenizer, prompts, max_new_tokens, stop=stop, **sampling):
        texts[piece.row] += piece.text
    return texts


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lm.generate",
        description="Complete prompts. One is streamed; several are printed when all are done.",
    )
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; repeat it")
    parser.add_argument(
        "--prompt-file",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="a prompt, as it is, last line break included; - is standard input, which is read too "
        "if no prompt is given and it is no terminal",
    )
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--num-samples", type=int, default=1, help="completions of each prompt")
    parser.add_argument("--stop", action="append", default=[], help="text to end before; repeat it")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: most probable token")
    parser.add_argument("--top-k", type=int, help="keep the k most probable tokens")
    parser.add_argument("--top-p", type=float, help="keep the tokens that make up this probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=Path("models/model"), help="its folder")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args(arguments)
    with one_line_errors():
        for holds, name, bound in (
            (
                1 <= options.max_new_tokens <= sys.maxsize,
                "max-new-tokens",
                f"in [1, {sys.maxsize}]",
            ),
            (options.num_samples >= 1, "num-samples", ">= 1"),
            (all(options.stop), "stop", "a text that is not empty"),
            (0 <= options.temperature < float("inf"), "temperature", ">= 0"),
            (options.top_k is None or options.top_k >= 1, "top-k", ">= 1"),
            (options.top_p is None or 0 < options.top_p <= 1, "top-p", "in (0, 1]"),
        ):
            if not holds:
                raise InputError(f"--{name}: must be {bound}")
        prompts, stop = (
            [_utf8(f"--{name}", os.fsencode(text)) for text in getattr(options, name)]
            for name in ("prompt", "stop")
        )
        prompts += [_read_prompt(file) for file in options.prompt_file]
        if not prompts:
            prompts = [""] if sys.stdin.isatty() else [_read_prompt(STDIN)]
        model, tokenizer = load_model(options.model, choose_device(options.device))
        longest = max(len(tokenizer.encode(prompt)) for prompt in prompts)
        require_memory(model, len(prompts) * options.num_samples, longest, options.dtype)
        prompts = [prompt for prompt in prompts for _ in range(options.num_samples)]
        sampling = Sampling(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            dtype=options.dtype,
        )
        if len(prompts) == 1:
            print(prompts[0], end="", flush=True)
            for text in complete(
                model, tokenizer, prompts[0], options.max_new_tokens, stop=stop, **sampling
            ):
                print(text, end="", flush=True)
            print()
            return
        texts = complete_many(
            model, tokenizer, prompts, options.max_new_tokens, stop=stop, **sampling
        )
        for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            print(f"==> {row} <==\n{prompt}{text}\n")


def _read_prompt(file: Path) -> str:
    """The text of a file, or of standard input. Raises InputError if it is not to be had."""
    if file == STDIN:
        return _utf8("standard input", sys.stdin.buffer.read())
    if not file.exists() or file.is_dir():
        raise InputError(f"{file}: {'a directory' if file.exists() else 'no such file'}")
    return _utf8(str(file), file.read_bytes())


def _utf8(name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}: byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8"
        ) from None
