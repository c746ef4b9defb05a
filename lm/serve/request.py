"""A request to /v1/completions: OpenAI's fields, read and checked before the model is asked."""

from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, NamedTuple

from lm.base.console import count
from lm.base.errors import InputError
from lm.base.sections import ABOVE_ZERO_UP_TO_ONE, NOT_EMPTY, SEED, Bound, Count, read_section
from lm.data.tokenizer import Tokenizer

PATH = "/v1/completions"
MAX_COMPLETIONS = 128  # of a request
# fields of OpenAI's that are not supported, with the value that has no effect
NEUTRAL: dict[str, Any] = {
    "best_of": 1,
    "suffix": "",
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
}


def _between(low: float, high: float) -> Bound:
    return Bound(lambda x: low <= x <= high, f"must be in [{low}, {high}]")


UP_TO_FOUR = Bound(lambda x: len(x) <= 4, "must hold at most 4 texts")


@dataclass(frozen=True)
class StreamOptions:
    """`stream_options` of a request."""

    include_usage: bool


@dataclass(frozen=True)
class Request:
    """The body of a request. `top_k` is ours, the rest OpenAI's, with its defaults."""

    model: str
    prompt: Any = ""  # see read_prompts
    max_tokens: Annotated[int, _between(0, 1 << 16)] = 16
    temperature: Annotated[float, _between(0, 2)] = 1.0
    top_k: Count | None = None
    top_p: Annotated[float, ABOVE_ZERO_UP_TO_ONE] = 1.0
    n: Annotated[int, _between(1, MAX_COMPLETIONS)] = 1
    seed: Annotated[int, SEED] | None = None
    stop: Annotated[list[Annotated[str, NOT_EMPTY]], UP_TO_FOUR] | None = None
    logprobs: Annotated[int, _between(0, 20)] | None = None
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # has no effect

    def __post_init__(self) -> None:
        if self.stream_options and not self.stream:
            raise InputError("request.stream_options = {...}: needs request.stream = true")
        if self.max_tokens == 0 and not self.echo:
            raise InputError("request.max_tokens = 0: needs request.echo = true")

    @property
    def wants_usage(self) -> bool:
        """Return whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class Prompt(NamedTuple):
    """A text to continue."""

    text: str
    ids: list[int]


def read_request(body: Any) -> Request:
    """Return the request in a JSON body. A field that is null counts as absent.

    Raises InputError, which names the field, for one that is unknown, of a wrong type, out of range
    or not supported.
    """
    if not isinstance(body, dict):
        raise InputError("the body is not a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    for name, neutral in NEUTRAL.items():
        if (value := given.pop(name, neutral)) != neutral:
            raise InputError(f"request.{name} = {str(value)[:80]}: is not supported")
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    defaults = {f.name: f.default for f in fields(Request) if f.default is not MISSING}
    return read_section(Request, {"request": defaults | given}, "request", PATH)


def read_prompts(request: Request, tokenizer: Tokenizer, context_length: int) -> list[Prompt]:
    """Return the prompts of a request: a text, token ids, or a list of either.

    Raises InputError for anything else, for more completions than MAX_COMPLETIONS, and for a prompt
    that is to be scored and exceeds the context.
    """
    given = request.prompt
    several = isinstance(given, list) and any(isinstance(item, str | list) for item in given)
    items = given if several else [given]
    if len(items) * request.n > MAX_COMPLETIONS:
        raise InputError(
            f"request.n = {request.n} for {count(len(items), 'prompt')}: expected at most "
            f"{MAX_COMPLETIONS} completions; ask for fewer"
        )
    prompts = [_read_prompt(item, tokenizer) for item in items]
    longest = max(len(prompt.ids) for prompt in prompts)
    if request.echo and request.logprobs is not None and longest > context_length:
        raise InputError(
            f"request.echo with request.logprobs: a prompt has {longest} tokens, the model's "
            f"context holds {context_length}; shorten it"
        )
    return prompts


def _read_prompt(item: Any, tokenizer: Tokenizer) -> Prompt:
    if isinstance(item, str):
        try:
            item.encode()
        except UnicodeEncodeError:
            raise InputError("request.prompt: half a surrogate pair is not a character") from None
        return Prompt(item, tokenizer.encode(item) or [tokenizer.end_id])
    if not (isinstance(item, list) and item and all(type(i) is int for i in item)):
        raise InputError("request.prompt: must be text, token ids, or a list of either")
    try:
        return Prompt(tokenizer.decode(item), item)
    except KeyError as error:
        raise InputError(f"request.prompt: the tokenizer has no id {error}") from None
