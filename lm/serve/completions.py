"""OpenAI's completions by a model: requests read and checked, answers and errors in its words.

    JSON -> Served.read -> Request, prompts as ids -> Served.choices: the model's turn,
        lm.generate.stream.stream -> pieces -> merged: one answer, or events: as they come

Nothing here knows of HTTP but the statuses of errors and the form of an event; lm.serve.app does.
"""

import json
import math
import re
import secrets
import time
import traceback
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from threading import Event, Lock, Semaphore
from typing import Annotated, Any, NamedTuple

import torch

from lm.base.config import (
    ABOVE_ZERO_UP_TO_ONE,
    NOT_EMPTY,
    SEED,
    Bound,
    Count,
    read_section,
)
from lm.base.errors import EnvironmentFault, InputError, is_out_of_memory
from lm.data.tokenizer import Tokenizer
from lm.generate.stream import NewToken, Reason, TextChunk, stream
from lm.model.transformer import TransformerLM

PATH = "/v1/completions"
MAX_ROWS = 128
MAX_SEATS = 64  # requests that have the model or wait for it
LOOK_SECONDS = 0.2  # how often one who waits for the model is looked after
_OFF = "is not supported"


def _between(low: float, high: float) -> Bound:
    return Bound(lambda x: low <= x <= high, f"must be in [{low}, {high}]")


@dataclass(frozen=True)
class StreamOptions:
    """`stream_options` of a request."""

    include_usage: bool


@dataclass(frozen=True)
class Request:
    """The body of a request to /v1/completions; `top_k` is ours, all else is OpenAI's."""

    model: str
    max_tokens: Annotated[int, _between(0, 1 << 16)]
    temperature: Annotated[float, _between(0, 2)]
    top_k: Count | None
    top_p: Annotated[float, ABOVE_ZERO_UP_TO_ONE]
    n: Annotated[int, _between(1, MAX_ROWS)]
    seed: Annotated[int, SEED] | None
    stop: Annotated[list[Annotated[str, NOT_EMPTY]], Bound(lambda x: len(x) <= 4, "at most 4")]
    logprobs: Annotated[int, _between(0, 20)] | None
    echo: bool
    stream: bool
    stream_options: StreamOptions | None
    user: str | None  # told, and of no effect
    best_of: Annotated[int, Bound(lambda x: x == 1, _OFF)] | None
    suffix: Annotated[str, Bound(lambda x: not x, _OFF)] | None
    presence_penalty: Annotated[float, Bound(lambda x: x == 0, _OFF)]
    frequency_penalty: Annotated[float, Bound(lambda x: x == 0, _OFF)]
    logit_bias: Annotated[dict[str, float], Bound(lambda x: not x, _OFF)]

    def __post_init__(self) -> None:
        if self.stream_options and not self.stream:
            raise InputError("request.stream_options = {...}: only with request.stream = true")
        if self.max_tokens == 0 and not self.echo:
            raise InputError("request.max_tokens = 0: only with request.echo = true")

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


DEFAULTS: dict[str, Any] = {  # OpenAI's, which its documentation names
    "max_tokens": 16,
    "temperature": 1.0,
    "top_p": 1.0,
    "n": 1,
    "stop": [],
    "echo": False,
    "stream": False,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
} | dict.fromkeys(["top_k", "seed", "logprobs", "stream_options", "user", "best_of", "suffix"])


class Prompt(NamedTuple):
    """What is to be continued."""

    text: str
    ids: list[int]


class Refused(Exception):
    """A request that is not the user's bad value: its HTTP status and OpenAI's code for it."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Usage:
    """Tokens read, each prompt once, and written."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def total(self) -> dict[str, int]:
        """As OpenAI tells it."""
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

    def card(self) -> dict[str, Any]:
        """The model as /v1/models shows it; the last two entries are ours."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "lm",
            "context_length": self.model.config.context_length,
            "num_parameters": self.model.num_parameters(),
        }

    def head(self) -> dict[str, Any]:
        """What an answer begins with; of a stream, each event of it."""
        return {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.name,
        }

    def require(self, name: str) -> None:
        """Raises Refused if this is another model's name."""
        if name != self.name:
            message = f"the model {name[:80]!r} does not exist; this server has {self.name!r}"
            raise Refused(404, message, "model_not_found")

    def read(self, body: Any) -> tuple[Request, list[Prompt]]:
        """The request and its prompts, checked. A value of null is as good as none.

        Raises InputError, naming what is unknown, of a wrong type or out of range.
        """
        if not isinstance(body, dict):
            raise InputError("the body is not a JSON object")
        given = {name: value for name, value in body.items() if value is not None}
        prompt = given.pop("prompt", "")
        if isinstance(given.get("stop"), str):
            given["stop"] = [given["stop"]]
        asked = read_section(Request, {"request": DEFAULTS | given}, "request", PATH)
        self.require(asked.model)
        several = isinstance(prompt, list) and any(isinstance(p, str | list) for p in prompt)
        items = prompt if several else [prompt]
        if len(items) * asked.n > MAX_ROWS:
            raise InputError(f"request.n = {asked.n}: times prompts it is more than {MAX_ROWS}")
        prompts = [self._read_prompt(item) for item in items]
        longest, context = max(len(p.ids) for p in prompts), self.model.config.context_length
        if asked.echo and asked.logprobs is not None and longest > context:
            raise InputError(
                f"request.echo with request.logprobs: a prompt has {longest} tokens, the model's "
                f"context {context}; send less"
            )
        return asked, prompts

    def _read_prompt(self, prompt: Any) -> Prompt:
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError:
                raise InputError("request.prompt: half a surrogate pair has no UTF-8") from None
            return Prompt(prompt, self.tokenizer.encode(prompt) or [self.tokenizer.end_id])
        if not (isinstance(prompt, list) and prompt and all(type(i) is int for i in prompt)):
            raise InputError("request.prompt: wanted text, token ids, or a list of either")
        try:
            return Prompt(self.tokenizer.decode(prompt), prompt)
        except KeyError as error:
            raise InputError(f"request.prompt: the tokenizer has no id {error}") from None

    @contextmanager
    def my_turn(self, left: Callable[[], bool]) -> Iterator[Callable[[], None]]:
        """The model alone; gives what to call between two tokens.

        Both raise Refused if the client has left or the server ends; so it does if too many wait.
        """

        def check() -> None:
            if left() or self.stopping.is_set():
                raise Refused(503, "stopped: the client left, or the server ends")

        if not self.seats.acquire(blocking=False):
            raise Refused(503, f"busy: {MAX_SEATS} requests wait for the model; try again later")
        try:
            while not self.turn.acquire(timeout=LOOK_SECONDS):
                check()
            try:
                yield check
            finally:
                self.turn.release()
        finally:
            self.seats.release()

    def choices(
        self, asked: Request, prompts: Sequence[Prompt], usage: Usage, left: Callable[[], bool]
    ) -> Iterator[dict[str, Any]]:
        """The answer in parts, as they come. The n rows of a prompt adjoin; a row is in order."""
        rows = [prompt for prompt in prompts for _ in range(asked.n)]
        usage.prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        with self.my_turn(left) as check:
            if asked.echo:
                for number, row in enumerate(rows):
                    check()
                    tokens = [] if asked.logprobs is None else self._scored(row.ids, asked.logprobs)
                    reason: Reason | None = None if asked.max_tokens else "length"
                    yield _choice(
                        TextChunk(number, row.text, tokens, reason), _Names(self.tokenizer), asked
                    )
            if asked.max_tokens == 0:
                return
            names = [_Names(self.tokenizer, len(row.text)) for row in rows]
            for piece in stream(
                self.model,
                self.tokenizer,
                [row.ids for row in rows],
                asked.max_tokens,
                stop=asked.stop,
                top_logprobs=asked.logprobs,
                temperature=asked.temperature,
                top_k=asked.top_k,
                top_p=asked.top_p if asked.top_p < 1 else None,
                seed=secrets.randbits(63) if asked.seed is None else asked.seed,
            ):
                check()
                usage.completion_tokens += len(piece.tokens)
                yield _choice(piece, names[piece.row], asked)

    @torch.inference_mode()
    def _scored(self, ids: list[int], top_logprobs: int) -> list[NewToken]:
        """The tokens of a prompt as if the model had drawn them; of the first it knows nothing."""
        row = torch.tensor([ids], device=next(self.model.parameters()).device)
        logits = self.model(row, documents=self.model.documents(row, self.tokenizer.end_id))
        logprobs = torch.log_softmax(logits[0, :-1].float(), dim=-1)  # (T - 1, V)
        chosen = logprobs.gather(1, row[0, 1:, None]).squeeze(1)
        values, best = logprobs.topk(min(top_logprobs, logprobs.shape[1]))  # (T - 1, n)
        tops = map(zip, best.tolist(), values.tolist())
        return [NewToken(ids[0]), *map(NewToken, ids[1:], chosen.tolist(), map(tuple, tops))]


class _Names:
    """Tokens as OpenAI names them, and where in prompt and completion each begins."""

    def __init__(self, tokenizer: Tokenizer, n_characters: int = 0):
        self.tokenizer, self.n_characters = tokenizer, n_characters
        self.characters = getincrementaldecoder("utf-8")("replace")

    def logprobs(self, tokens: Sequence[NewToken]) -> dict[str, Any]:
        """The entry `logprobs` of a choice, for the next tokens of its row."""
        offsets = []
        for token in tokens:
            offsets.append(self.n_characters)
            data = self.tokenizer.decode_bytes([token.id])
            self.n_characters += len(self.characters.decode(data))
        return {
            "tokens": [self.name(token.id) for token in tokens],
            "token_logprobs": [None if math.isnan(t.logprob) else t.logprob for t in tokens],
            "top_logprobs": [
                None
                if math.isnan(token.logprob)
                else {self.name(i): p for i, p in [*token.top, (token.id, token.logprob)]}
                for token in tokens
            ],
            "text_offset": offsets,
        }

    def name(self, token: int) -> str:
        """The text of a token, or its bytes where they are no text."""
        data = self.tokenizer.decode_bytes([token])
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _choice(piece: TextChunk, names: _Names, asked: Request) -> dict[str, Any]:
    return {
        "index": piece.row,
        "text": piece.text,
        "logprobs": None if asked.logprobs is None else names.logprobs(piece.tokens),
        "finish_reason": piece.finish_reason,
    }


def begun(parts: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The parts, when the first is there: what fails before it still has a status of its own."""
    return chain([next(parts)], parts)


def merged(parts: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choices whose parts these are."""
    choices: dict[int, dict[str, Any]] = {}
    for part in parts:
        choice = choices.setdefault(part["index"], part)
        if choice is not part:
            choice["text"] += part["text"]
            choice["finish_reason"] = part["finish_reason"]
            for key, values in (part["logprobs"] or {}).items():
                choice["logprobs"][key] += values
    return [choices[index] for index in sorted(choices)]


def events(
    head: dict[str, Any], parts: Iterator[dict[str, Any]], usage: Usage | None
) -> Iterator[str]:
    """Server-sent events: the parts, the usage if asked for, and the end; or an error."""
    told = {} if usage is None else {"usage": None}
    try:
        for part in parts:
            yield _event(head | {"choices": [part]} | told)
        if usage is not None:
            yield _event(head | {"choices": [], "usage": usage.total()})
        yield "data: [DONE]\n\n"
    except Exception as error:  # the status has gone out, so this is told as an event
        yield _event(fault(error)[0])


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def fault(error: Exception) -> tuple[dict[str, Any], int]:
    """What went wrong, as OpenAI tells it, and the HTTP status. A defect of ours is logged."""
    message = str(error)
    if isinstance(error, InputError):
        found = re.search(r"request\.(\w+)", message)
        return refusal(400, message, param=found[1] if found else None)
    if isinstance(error, Refused):
        return refusal(error.status, message, code=error.code)
    if isinstance(error, EnvironmentFault):
        return refusal(503, message)
    if is_out_of_memory(error):
        return refusal(503, "out of memory; ask for fewer completions at once")
    traceback.print_exception(error)
    return refusal(500, "a defect of this server; it has logged a traceback")


def refusal(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> tuple[dict[str, Any], int]:
    """OpenAI's form of an error, and the HTTP status."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}, status
