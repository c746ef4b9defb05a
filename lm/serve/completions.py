"""The model's answer to a request, part by part as it is generated.

Request, prompts -> Served.answer: the model's turn, lm.generate.stream.stream -> parts -> merged
"""

import math
import secrets
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from threading import Event, Lock, Semaphore
from typing import Any

import torch

from lm.base.errors import EnvironmentFault, InputError
from lm.data.tokenizer import Tokenizer
from lm.generate.stream import NewToken, Reason, TextChunk, stream
from lm.model.transformer import TransformerLM
from lm.serve.request import Prompt, Request

MAX_SEATS = 64  # requests that hold the model or wait for it
POLL_SECONDS = 0.2  # how often a request that waits checks whether its client has left
Part = dict[str, Any]  # of a choice, in OpenAI's form
HasLeft = Callable[[], bool]


class UnknownModel(InputError):
    """A request for a model that is not served."""


@dataclass
class Usage:
    """Tokens read, each prompt once, and tokens generated."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def total(self) -> dict[str, int]:
        """Return OpenAI's entry `usage`."""
        return asdict(self) | {"total_tokens": self.prompt_tokens + self.completion_tokens}


@dataclass
class Served:
    """A model that answers requests, one at a time."""

    name: str
    created: int  # seconds since 1970
    model: TransformerLM
    tokenizer: Tokenizer
    stopping: Event = field(default_factory=Event)
    turn: Lock = field(default_factory=Lock)
    seats: Semaphore = field(default_factory=lambda: Semaphore(MAX_SEATS))

    def entry(self) -> dict[str, Any]:
        """Return the model as /v1/models lists it; the last two keys are ours, not OpenAI's."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "lm",
            "context_length": self.model.config.context_length,
            "num_parameters": self.model.num_parameters(),
        }

    def require(self, name: str) -> None:
        """Raise UnknownModel if `name` is not this model's."""
        if name != self.name:
            message = f"the model {name[:80]!r} does not exist; this server has {self.name!r}"
            raise UnknownModel(message)

    @contextmanager
    def holding_the_model(self, has_left: HasLeft) -> Iterator[Callable[[], None]]:
        """Wait for the model and hold it; yield a check to call between two tokens.

        Both waiting and the check raise EnvironmentFault if the client has left or the server ends;
        waiting also if MAX_SEATS requests are there already.
        """

        def check() -> None:
            if has_left() or self.stopping.is_set():
                raise EnvironmentFault("stopped: the client left, or the server ends")

        if not self.seats.acquire(blocking=False):
            message = f"busy: {MAX_SEATS} requests wait for the model; try again later"
            raise EnvironmentFault(message)
        try:
            while not self.turn.acquire(timeout=POLL_SECONDS):
                check()
            try:
                yield check
            finally:
                self.turn.release()
        finally:
            self.seats.release()

    def answer(
        self, request: Request, prompts: Sequence[Prompt], usage: Usage, has_left: HasLeft
    ) -> Iterator[Part]:
        """Yield the parts of the answer as they are generated; count tokens in `usage`.

        The choices of a prompt have consecutive indices. The parts of each choice are in order.
        """
        rows = [prompt for prompt in prompts for _ in range(request.n)]
        usage.prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        with self.holding_the_model(has_left) as check:
            if self.model.head.is_cuda:  # each thread has a current device of its own
                torch.cuda.set_device(self.model.head.device)
            reason: Reason | None = None if request.max_tokens else "length"
            for index, row in enumerate(rows if request.echo else []):
                check()
                tokens = [] if request.logprobs is None else self._scored(row.ids, request.logprobs)
                echo = TextChunk(index, row.text, tokens, reason)
                yield _part(echo, _TokenNames(self.tokenizer), request)
            if request.max_tokens == 0:
                return
            names = [_TokenNames(self.tokenizer, len(row.text)) for row in rows]
            for piece in stream(
                self.model,
                self.tokenizer,
                [row.ids for row in rows],
                request.max_tokens,
                stop=request.stop or [],
                top_logprobs=request.logprobs,
                temperature=request.temperature,
                top_k=request.top_k,
                top_p=request.top_p if request.top_p < 1 else None,
                seed=secrets.randbits(63) if request.seed is None else request.seed,
            ):
                check()
                usage.completion_tokens += len(piece.tokens)
                yield _part(piece, names[piece.row], request)

    @torch.inference_mode()
    def _scored(self, ids: list[int], top_logprobs: int) -> list[NewToken]:
        """Return a prompt's tokens as if the model had drawn them; the first has no probability."""
        row = torch.tensor([ids], device=next(self.model.parameters()).device)
        logits = self.model(row, documents=self.model.documents(row, self.tokenizer.end_id))
        logprobs = torch.log_softmax(logits[0, :-1].float(), dim=-1)  # (T - 1, V)
        chosen = logprobs.gather(1, row[0, 1:, None]).squeeze(1)
        values, best = logprobs.topk(min(top_logprobs, logprobs.shape[1]))  # (T - 1, n)
        tops = map(zip, best.tolist(), values.tolist())
        return [NewToken(ids[0]), *map(NewToken, ids[1:], chosen.tolist(), map(tuple, tops))]


class _TokenNames:
    """Name the tokens of a choice as OpenAI does, and find where in its text each begins."""

    def __init__(self, tokenizer: Tokenizer, n_characters: int = 0):
        self.tokenizer, self.n_characters = tokenizer, n_characters
        self.characters = getincrementaldecoder("utf-8")("replace")

    def logprobs(self, tokens: Sequence[NewToken]) -> dict[str, Any]:
        """Return the entry `logprobs` of a part, for the next tokens of its choice."""
        found: dict[str, Any] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
        }  # fmt: skip
        for token in tokens:
            known = not math.isnan(token.logprob)
            top = {self.name(i): p for i, p in [*token.top, (token.id, token.logprob)]}
            found["tokens"].append(self.name(token.id))
            found["token_logprobs"].append(token.logprob if known else None)
            found["top_logprobs"].append(top if known else None)
            found["text_offset"].append(self.n_characters)
            data = self.tokenizer.decode_bytes([token.id])
            self.n_characters += len(self.characters.decode(data))
        return found

    def name(self, token: int) -> str:
        """Return the text of a token, or its bytes where they are not text."""
        data = self.tokenizer.decode_bytes([token])
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _part(piece: TextChunk, names: _TokenNames, request: Request) -> Part:
    return {
        "index": piece.row,
        "text": piece.text,
        "logprobs": None if request.logprobs is None else names.logprobs(piece.tokens),
        "finish_reason": piece.finish_reason,
    }


def merged(parts: Iterator[Part]) -> list[Part]:
    """Join the parts of each choice."""
    choices: dict[int, Part] = {}
    for part in parts:
        choice = choices.setdefault(part["index"], part)
        if choice is not part:
            choice["text"] += part["text"]
            choice["finish_reason"] = part["finish_reason"]
            for key, values in (part["logprobs"] or {}).items():
                choice["logprobs"][key] += values
    return [choices[index] for index in sorted(choices)]
