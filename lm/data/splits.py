"""Both splits of data/tokens, opened and verified, and batches dealt from them.

    data/tokens --open_tokens--> Split, Split --Split.batch(step)--> x, y

shards.py describes the files, token_stream.py reads them, order.py decides which windows make a
batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from lm.base.errors import InputError
from lm.base.settings import WindowOrder
from lm.data.order import DocumentWindows, Numbers, deal, epoch_places, random_places
from lm.data.shards import MANIFEST, REMEDY, SPLITS, read_manifest
from lm.data.token_stream import TokenStream
from lm.data.tokenizer import Tokenizer

WINDOWS_AHEAD = 1024  # computed at once
SCANNED_TOKENS = 1 << 22  # read at once to find the ends of documents


@dataclass(frozen=True)
class WeightedSource:
    """The tokens from `start` to before `stop` of a split, which get their own share of windows."""

    name: str
    start: int
    stop: int
    weight: float


@dataclass(frozen=True)
class Split:
    """The tokens of one split, and the batches dealt from them.

    If no source has a weight, all tokens are dealt as one source.
    """

    name: str
    tokens: NDArray[Any] | TokenStream  # (n_tokens,), uint16 or uint32
    n_bytes: int
    end_id: int | None = None
    weighted: tuple[WeightedSource, ...] = ()
    # caches: the windows of documents, and the starts of the next batches
    _documents: dict[tuple[int, int], DocumentWindows] = field(default_factory=dict, repr=False)
    _ahead: dict[tuple[Any, ...], tuple[int, Numbers]] = field(default_factory=dict, repr=False)

    def require(self, context_length: int) -> None:
        """Raise InputError unless one window and its shifted targets fit, in each source too."""
        if len(self.tokens) < context_length + 1:
            raise InputError(
                f"the {self.name} split has {len(self.tokens):,} tokens, but one window needs "
                f"model.context_length + 1 = {context_length + 1:,}; lower model.context_length or "
                "add text"
            )
        for source in self.weighted:
            if source.stop - source.start < context_length + 1:
                raise InputError(
                    f"source {source.name} has {source.stop - source.start:,} tokens in the "
                    f"{self.name} split, but one window needs model.context_length + 1 = "
                    f"{context_length + 1:,}; lower model.context_length, add text or leave the "
                    "source out"
                )

    def batch(
        self,
        step: int,
        batch_size: int,
        context_length: int,
        seed: int,
        sampling: WindowOrder,
        rows: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return batch `step` (from 0): x and the targets y, both (batch_size, context_length).

        Pass `rows` to get only some of its windows.
        """
        starts = self.starts(step, batch_size, context_length, seed, sampling)
        return windows(self.tokens, starts if rows is None else starts[rows], context_length)

    def starts(
        self, step: int, batch_size: int, context_length: int, seed: int, sampling: WindowOrder
    ) -> NDArray[np.int64]:
        """Return the place of the first token of each window of a batch, (batch_size,).

        A pure function of (seed, step). "random" draws windows anywhere, with replacement.
        "epochs" deals adjoining windows, "documents" deals windows cut from the start of each
        document; both deal each window once an epoch, in a new order each time. Each weighted
        source gets its exact share of the windows and has its own epochs.
        """
        kind = batch_size, context_length, seed, sampling
        first, ahead = self._ahead.get(kind, (step, np.empty((0, batch_size), dtype=np.int64)))
        if not 0 <= step - first < len(ahead):
            # many steps cost little more than one, but the first call may be the only one
            n_steps = max(1, WINDOWS_AHEAD // batch_size) if kind in self._ahead else 1
            first, ahead = step, self._compute_starts(range(step, step + n_steps), *kind)
            self._ahead[kind] = first, ahead
        return ahead[step - first]

    def _compute_starts(
        self, steps: range, batch_size: int, context_length: int, seed: int, sampling: WindowOrder
    ) -> NDArray[np.int64]:
        """Return the starts of several steps at once, (len(steps), batch_size)."""
        self.require(context_length)
        numbers = steps.start * batch_size + np.arange(len(steps) * batch_size)
        sources = self.weighted or (WeightedSource("", 0, len(self.tokens), 1.0),)
        owners, numbers = deal(tuple(source.weight for source in sources), numbers)
        starts = np.empty_like(numbers)
        for number, source in enumerate(sources):
            mine, stream = owners == number, [number] if self.weighted else []
            size, start_of = self._windows_of(source, context_length, sampling)
            match sampling:
                case "random":
                    places = random_places(seed, steps, batch_size, size)[mine]
                case "epochs" | "documents":
                    places = epoch_places(seed, numbers[mine], size, *stream)
                case _:
                    assert_never(sampling)
            starts[mine] = source.start + start_of(places)
        return starts.reshape(-1, batch_size)

    def _windows_of(
        self, source: WeightedSource, context_length: int, sampling: WindowOrder
    ) -> tuple[int, Callable[[Numbers], Numbers]]:
        """Return the number of windows of a source, and a function from their numbers to starts."""
        last = source.stop - source.start - context_length - 1
        match sampling:
            case "random":
                return last + 1, lambda places: places
            case "epochs":
                return last // context_length + 1, lambda places: places * context_length
            case "documents":
                documents = self._documents_of(source, context_length)
                return len(documents), lambda places: np.minimum(documents.starts(places), last)
            case _:
                assert_never(sampling)

    def _documents_of(self, source: WeightedSource, context_length: int) -> DocumentWindows:
        key = source.start, context_length
        if key not in self._documents:
            if self.end_id is None:
                raise InputError(
                    "train.sampling = documents: the id that ends a document is unknown; use epochs"
                )
            starts = range(source.start, source.stop, SCANNED_TOKENS)
            chunks = (self.tokens[i : min(i + SCANNED_TOKENS, source.stop)] for i in starts)
            self._documents[key] = DocumentWindows(chunks, self.end_id, context_length)
            if not len(self._documents[key]):
                raise InputError(f"{source.name or self.name}: every document is empty; add text")
        return self._documents[key]


def windows(
    tokens: NDArray[Any] | TokenStream, starts: NDArray[np.int64], context_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the windows at `starts` (B,) as x (B, T), and y (B, T) one token later."""
    if isinstance(tokens, TokenStream):
        rows = tokens.rows(starts, context_length + 1)
    else:
        rows = tokens[starts[:, None] + np.arange(context_length + 1)]
    rows = rows.astype(np.int64)
    return rows[:, :-1], rows[:, 1:]


@dataclass(frozen=True)
class Splits:
    """Both splits of an opened data/tokens folder."""

    train: Split
    valid: Split
    vocab_size: int


def open_tokens(
    folder: Path, tokenizer_sha256: str | None = None, tokenizer: Tokenizer | None = None
) -> Splits:
    """Open data/tokens and verify its files by tokens.json.

    Raises InputError if a file is missing, truncated, extended or edited, if it has ids beyond the
    vocabulary, or if the tokens were made with another tokenizer.
    """
    manifest = read_manifest(folder)
    if tokenizer_sha256 not in (None, manifest["tokenizer_sha256"]):
        raise InputError(f"{folder}: made with another tokenizer; {REMEDY}")
    for name in ("vocab_size", "end_id") if tokenizer is not None else ():
        if manifest[name] != getattr(tokenizer, name):
            raise InputError(
                f"{folder / MANIFEST}: {name} = {manifest[name]}, but the tokenizer's is "
                f"{getattr(tokenizer, name)}; {REMEDY}"
            )
    train, valid = (_open_split(folder, split, manifest) for split in SPLITS)
    return Splits(train, valid, manifest["vocab_size"])


def _open_split(folder: Path, name: str, manifest: dict[str, Any]) -> Split:
    dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    entries = [shard[name] for shard in manifest["shards"]]
    files = [folder / entry["file"] for entry in entries]
    tokens = TokenStream(files, entries, dtype, manifest["vocab_size"])
    weighted = _weighted(name, manifest) if name == "train" else ()  # shares of training alone
    return Split(name, tokens, manifest[name]["bytes"], manifest["end_id"], weighted)


def _weighted(split: str, manifest: dict[str, Any]) -> tuple[WeightedSource, ...]:
    """Return the sources of a split and their places, if they have weights."""
    sources, start = [], 0
    for source in manifest["sources"]:
        shards = [shard for shard in manifest["shards"] if shard["source"] == source["name"]]
        stop = start + sum(shard[split]["tokens"] for shard in shards)
        if source["weight"] is not None:
            sources.append(WeightedSource(source["name"], start, stop, float(source["weight"])))
        start = stop
    return tuple(sources)
