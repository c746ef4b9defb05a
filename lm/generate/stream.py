"""Sample text from a model.

    generate    prompts as ids -> a NewToken for each row and step
    stream      prompts as text -> TextChunk: text that can be shown, without stop texts

A row whose context is full forgets the older half: the newer half is read again from position 0.
"""

import codecs
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Literal, NamedTuple, TypedDict, Unpack

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lm.base import rng
from lm.base.settings import Dtype
from lm.data.tokenizer import Tokenizer
from lm.generate.decoder import Decoder, memory_bytes
from lm.machine.device import to_device
from lm.machine.gauges import free_memory_bytes, require_memory
from lm.model.transformer import TransformerLM

DRAWS = 256  # random numbers that a row draws at a time
COLD = 1e-12  # lower temperatures count as 0: logits divided by them would overflow


class NewToken(NamedTuple):
    """A token that the model appended to a row.

    Log-probabilities are in nats, before temperature, top-k and top-p. Without `top_logprobs` (see
    `generate`) they are not computed.
    """

    id: int
    logprob: float = math.nan
    top: tuple[tuple[int, float], ...] = ()  # the most probable ids, in order


PendingTokens = Callable[[], list[NewToken]]  # waits for the tokens of a step, one for each row


class SamplingOptions(TypedDict, total=False):
    """How the next token is computed and chosen: options of `generate`."""

    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    dtype: Dtype


Reason = Literal["stop", "length"]  # a stop text or the end token; max_new_tokens


@dataclass(frozen=True)
class TextChunk:
    """A part of a row's completion: whole characters, and no part of a stop text.

    The chunks of a row hold all of its tokens, those of a stop text and the end token included.
    """

    row: int
    text: str
    tokens: list[NewToken]
    finish_reason: Reason | None = None  # in a row's last chunk


def generate(
    model: TransformerLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    end_id: int | None = None,
    seed: int = 0,
    dtype: Dtype = "float32",
    top_logprobs: int | None = None,
) -> Iterator[list[NewToken | None]]:
    """Continue several prompts together; yield a new token for each row, step after step.

    A row yields None after `end_id`, which ends a document. Its tokens depend on the seed and the
    row's number, not on the other prompts. Temperature 0 takes the most probable token. With
    `top_logprobs` = n a token has its log-probability, and those of the n most probable ids.
    Raises ValueError for an empty prompt, EnvironmentFault if the rows do not fit into memory.
    """
    if not all(prompts):
        raise ValueError("an empty prompt; begin with the end token instead")
    require_rows_fit(model, len(prompts), max(map(len, prompts), default=0), dtype)
    decoder = Decoder(model, len(prompts), end_id, getattr(torch, dtype))

    def choose(logits: Tensor, draws: Tensor) -> Tensor:
        return sample(logits, temperature, top_k, top_p, draws)

    steps = islice(draw_tokens(decoder, prompts, seed, choose, top_logprobs), max_new_tokens)
    ended = [False] * len(prompts)
    for tokens in one_ahead(steps) if model.head.is_cuda else steps:
        new = tokens()
        yield [None if end else token for token, end in zip(new, ended, strict=True)]
        ended = [end or token.id == end_id for token, end in zip(new, ended, strict=True)]
        if all(ended):
            return


def draw_tokens(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    seed: int,
    choose: Callable[[Tensor, Tensor], Tensor],
    top_logprobs: int | None = None,
) -> Iterator[PendingTokens]:
    """Append tokens to each prompt without end; `choose` makes ids of logits and random numbers.

    The host waits for a GPU only where a row's context is full.
    """
    device, length = decoder.positions.device, decoder.config.context_length
    histories, unread = [list(prompt) for prompt in prompts], list[PendingTokens]()
    logits = decoder.read(range(len(prompts)), [_last_ids(ids, length) for ids in histories])
    for draws in _draws(seed, len(prompts), device):
        ids = choose(logits, draws)
        unread.append(_new_tokens(logits, ids, top_logprobs))
        yield unread[-1]
        full = [row for row, taken in enumerate(decoder.lengths) if taken == length]
        logits = decoder.step(ids)
        while len(unread) > (0 if full else 1):  # the last may still be computed
            for history, token in zip(histories, unread.pop(0)(), strict=True):
                history.append(token.id)
        if full:
            latest = [_last_ids(histories[row], length) for row in full]
            rows = torch.tensor(full, device=device)
            logits = logits.index_copy(0, rows, decoder.read(full, latest))


def one_ahead(steps: Iterator[PendingTokens]) -> Iterator[PendingTokens]:
    """Yield each step after the next has begun: a GPU works while the host reads the tokens."""
    before = next(steps, None)
    while before is not None:
        after = next(steps, None)
        yield before
        before = after


def require_rows_fit(model: TransformerLM, n_rows: int, longest: int, dtype: Dtype) -> None:
    """Raise EnvironmentFault if a Decoder of these rows does not fit; see `memory_bytes`."""
    longest, on_gpu = min(longest, model.config.context_length), model.head.is_cuda
    require_memory(
        f"{n_rows:,} completions at once need",
        memory_bytes(model, n_rows, longest, getattr(torch, dtype), on_gpu),
        free_memory_bytes(model.head.device),
        "ask for fewer at once",
        times=1.0,  # all of it is allocated
    )


def _last_ids(ids: Sequence[int], context_length: int) -> Sequence[int]:
    """Return the last ids, at most context_length; drop half a context at a time."""
    if len(ids) <= context_length:
        return ids
    half = max(1, context_length // 2)
    return ids[-(-(len(ids) - context_length) // half) * half :]


def _draws(seed: int, n_rows: int, device: torch.device) -> Iterator[Float[Tensor, " B"]]:
    """Yield a number in [0, 1) for each row, without end: a function of (seed, row, step)."""
    for block in count():
        rows = [rng.seed(seed, "generate", row, block) for row in range(n_rows)]
        numbers = np.stack([rng.random_uniforms(key, DRAWS) for key in rows], axis=1)
        yield from to_device(numbers, _with_float64(device))


def _with_float64(device: torch.device) -> torch.device:
    """Return the device that draws: mps has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def sample(
    logits: Float[Tensor, "B V"],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    draws: Float[Tensor, " B"],
) -> Int[Tensor, " B"]:
    """Return an id per row: the inverse of the cumulative distribution at draws in [0, 1).

    Top-k keeps the k most probable ids; top-p the fewest whose probabilities reach p (Holtzman
    et al. 2020), after top-k. Temperature 0: the most probable id.
    """
    if temperature <= COLD:
        return logits.max(dim=-1).indices  # argmax takes several times as long
    device, where, order = logits.device, _with_float64(logits.device), None
    logits, draws = logits.to(where), draws.to(where)
    if top_k is not None or top_p is not None:  # the most probable first
        k = logits.shape[1] if top_k is None else min(top_k, logits.shape[1])
        logits, order = logits.topk(k)  # (B, k)
    divisor = torch.tensor(temperature, dtype=torch.float32)
    probabilities = torch.softmax(logits.double() / divisor, dim=-1)
    one = 1.0
    if logits.is_cuda:  # in whole numbers: a GPU adds in no fixed order
        one = 2.0**52
        probabilities = (probabilities * one).long()
    cumulative = probabilities.cumsum(dim=-1)
    if top_p is not None:
        before = cumulative - probabilities
        cumulative = probabilities.masked_fill(before >= top_p * one, 0).cumsum(dim=-1)
    targets = (draws.double()[:, None] * cumulative[:, -1:]).to(cumulative.dtype)
    places = torch.searchsorted(cumulative, targets, right=True)  # (B, 1)
    places = places.clamp(max=logits.shape[1] - 1)
    chosen = places if order is None else order.gather(1, places)
    return chosen.squeeze(1).to(device)


def _new_tokens(
    logits: Float[Tensor, "B V"], ids: Int[Tensor, " B"], top_logprobs: int | None
) -> PendingTokens:
    """Copy a step's tokens to the host, with log-probabilities unless `top_logprobs` is None.

    Return a function that waits for them. Copies from a GPU go to pinned memory, without waiting.
    """
    wanted = [ids]
    if top_logprobs is not None:
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        wanted += [
            logprobs.gather(1, ids[:, None]).squeeze(1),
            *logprobs.topk(min(top_logprobs, logits.shape[1])),  # values and places (B, n)
        ]
    copies = [tensor.to("cpu", non_blocking=ids.is_cuda) for tensor in wanted]
    done = torch.cuda.current_stream(ids.device).record_event() if ids.is_cuda else None

    @functools.cache
    def tokens() -> list[NewToken]:
        if done is not None:
            done.synchronize()
        new, *known = (copy.tolist() for copy in copies)
        if not known:
            return [NewToken(i) for i in new]
        chosen, values, places = known
        tops = [tuple(zip(*row, strict=True)) for row in zip(places, values, strict=True)]
        return list(map(NewToken, new, chosen, tops))

    return tokens


class Completion:
    """The text of a row while it grows, and its last characters, which must wait."""

    def __init__(self, stop: Sequence[str]):
        self.stop = stop
        self.held = ""  # may be the beginning of a stop text
        self.tokens: list[NewToken] = []  # since the last chunk
        # a token may end inside a character
        self.characters = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, data: bytes, final: bool) -> tuple[str, bool]:
        """Append bytes; return the text to show now, and whether a stop text has ended it."""
        text = self.held + self.characters.decode(data, final)
        ends = [(text.find(s) + len(s), text.find(s)) for s in self.stop if s in text]
        if ends:
            return text[: min(ends)[1]], True  # complete first; of several, the longest
        n_held = 0 if final else max((_overlap(text, s) for s in self.stop), default=0)
        self.held = text[len(text) - n_held :]
        return text[: len(text) - n_held], False


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text may begin a stop text."""
    return max(n for n in range(min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))


def stream(
    model: TransformerLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int,
    *,
    stop: Sequence[str] = (),
    top_logprobs: int | None = None,
    **sampling: Unpack[SamplingOptions],
) -> Iterator[TextChunk]:
    """Complete several prompts together; yield a row's text as soon as it is certain.

    A row ends at the end token, before the stop text that is complete first, or after
    max_new_tokens.
    A prompt is text or ids; an empty one begins with the end token. Stop texts must not be empty.
    """
    end_id = tokenizer.end_id
    ids = [(tokenizer.encode(p) if isinstance(p, str) else p) or [end_id] for p in prompts]
    going = {row: Completion(stop) for row in range(len(prompts))}
    steps = generate(
        model, ids, max_new_tokens, end_id=end_id, top_logprobs=top_logprobs, **sampling
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
                yield TextChunk(row, text, completion.tokens, reason)
                completion.tokens = []
            if reason:
                del going[row]
        if not going:
            return
