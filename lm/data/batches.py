"""Token shards, opened and verified, and batches dealt from them.

    data/tokens --open_tokens--> TokenStream of each split --Split.batch(step)--> x, y

shards.py describes the files; order.py decides which windows make a batch.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from lm.base.errors import InputError
from lm.base.settings import WindowOrder
from lm.data.order import DocumentWindows, Numbers, deal, drawn, ordered
from lm.data.shards import MANIFEST, REMEDY, SPLITS, read_manifest
from lm.data.tokenizer import Tokenizer

WINDOWS_AHEAD = 1024  # whose starts are computed at once
SCANNED_TOKENS = 1 << 22  # read at once to find the ends of documents
HASHED_TOKENS = 1 << 18  # read at once to verify a file
OPEN_FILES = 100  # of a split at a time: with two splits less than the 256 that macOS allows
Signature = tuple[int, int, int]
DType = np.dtype[Any]


class TokenStream:
    """Shards as one 1-D array of ids that stay on disk: len(), slices, rows of equal length.

    Files are read, not mapped: an access to a mapped file that somebody has truncated ends the
    process by SIGBUS without a message. Copying a window costs no more than mapping it.
    """

    def __init__(
        self,
        files: Sequence[Path],
        entries: Sequence[dict[str, Any]],
        dtype: DType,
        vocab_size: int,
    ):
        """Verify the files by their entries of tokens.json.

        Raises InputError if one is missing, truncated, extended or edited, or has an id beyond the
        vocabulary.
        """
        self._descriptors: dict[int, int] = {}  # by number of the file, the oldest first
        self._signatures: dict[int, Signature] = {}  # of verified files
        self._files, self._entries, self.dtype = files, entries, dtype
        self._vocab_size = vocab_size
        lengths = [entry["tokens"] for entry in entries]
        self._bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        for number in range(len(files)):
            os.close(self._open(number))

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def __getitem__(self, place: slice) -> NDArray[Any]:
        """Return the ids of a slice without a step. Raises InputError if a file has changed.

        Every id is compared with the vocabulary, in case a file was rewritten in place: that costs
        next to nothing, and the model would end in an IndexError.
        """
        start, stop, _ = place.indices(len(self))
        ids = np.empty(max(0, stop - start), dtype=self.dtype)
        view = ids.view(np.uint8).data
        file = int(np.searchsorted(self._bounds, start, side="right")) - 1
        offset = (start - int(self._bounds[file])) * self.dtype.itemsize
        while view:
            rest = int(self._bounds[file + 1] - self._bounds[file]) * self.dtype.itemsize - offset
            if rest == 0:
                file, offset = file + 1, 0
                continue
            size = os.preadv(self._descriptor(file), [view[:rest]], offset)  # 2 GiB at most
            if size == 0:
                raise InputError(f"{self._files[file]}: became shorter while it was read; {REMEDY}")
            view, offset = view[size:], offset + size
        if ids.size and ids.max() >= self._vocab_size:
            raise self._beyond_vocabulary(ids, start)
        return ids

    def rows(self, starts: NDArray[np.int64], length: int) -> NDArray[Any]:
        """Return `length` ids from each start, (len(starts), length); raises as a slice does."""
        width, size = length * self.dtype.itemsize, self.dtype.itemsize
        files = np.searchsorted(self._bounds, starts, side="right") - 1
        offsets = (starts - self._bounds[files]) * size
        sizes = np.minimum(width, (self._bounds[files + 1] - starts) * size)
        places = zip(files.tolist(), sizes.tolist(), offsets.tolist(), strict=True)
        read = [os.pread(self._descriptor(f), size, offset) for f, size, offset in places]
        if min(map(len, read), default=width) < width:
            for row, start in enumerate(starts.tolist()):
                if len(read[row]) < width:  # it goes on in the next file, or this one has shrunk
                    read[row] = self[start : start + length].tobytes()
        rows = np.frombuffer(b"".join(read), dtype=self.dtype).reshape(-1, length)
        if rows.size and rows.max() >= self._vocab_size:
            row = int(rows.max(axis=1).argmax())
            raise self._beyond_vocabulary(rows[row], int(starts[row]))
        return rows

    def _beyond_vocabulary(self, ids: NDArray[Any], start: int) -> InputError:
        """Return the error for the first id beyond the vocabulary; `ids` begin at `start`."""
        at = int((ids >= self._vocab_size).argmax())
        file = int(np.searchsorted(self._bounds, start + at, side="right")) - 1
        return InputError(
            f"{self._files[file]}: token {start + at - self._bounds[file]} has the id {ids[at]}, "
            f"the vocabulary {self._vocab_size} ids; {REMEDY}"
        )

    def _descriptor(self, number: int) -> int:
        """Return an open file; beyond OPEN_FILES close the one that was opened first."""
        descriptor = self._descriptors.get(number)
        if descriptor is None:
            if len(self._descriptors) == OPEN_FILES:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            descriptor = self._descriptors[number] = self._open(number)
        return descriptor

    def _open(self, number: int) -> int:
        """Open a file, and verify its content unless this very file was verified before."""
        if not self._files[number].is_file():
            raise InputError(f"{self._files[number]}: no such file; {REMEDY}")
        descriptor = os.open(self._files[number], os.O_RDONLY)
        status = os.fstat(descriptor)
        signature = status.st_ino, status.st_size, status.st_mtime_ns
        if signature != self._signatures.get(number):
            try:
                self._verify(descriptor, number)
            except BaseException:
                os.close(descriptor)
                raise
            self._signatures[number] = signature
        return descriptor

    def _verify(self, descriptor: int, number: int) -> None:
        file, entry = self._files[number], self._entries[number]
        size = entry["tokens"] * self.dtype.itemsize
        if (found := os.fstat(descriptor).st_size) != size:
            raise InputError(f"{file}: {found} bytes, tokens.json says {size}; {REMEDY}")
        digest, beyond, start = hashlib.sha256(), None, int(self._bounds[number])
        buffer = np.empty(HASHED_TOKENS, dtype=self.dtype)
        view = buffer.view(np.uint8).data
        with open(descriptor, "rb", closefd=False) as stream:
            while read := stream.readinto(view):
                digest.update(view[:read])
                ids = buffer[: read // self.dtype.itemsize]
                if beyond is None and ids.size and ids.max() >= self._vocab_size:
                    beyond = self._beyond_vocabulary(ids, start)
                start += len(ids)
        if digest.hexdigest() != entry["sha256"]:
            raise InputError(f"{file}: content differs from the hash in tokens.json; {REMEDY}")
        if beyond is not None:
            raise beyond

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


@dataclass(frozen=True)
class WeightedSource:
    """A part of a split that has a share of the windows of its own."""

    name: str
    start: int
    stop: int
    weight: float


@dataclass(frozen=True)
class Split:
    """The tokens of one split, and the batches dealt from them.

    If no source has a weight, windows come from all the tokens alike.
    """

    name: str
    tokens: NDArray[Any] | TokenStream  # (n_tokens,), uint16 or uint32
    n_bytes: int
    end_id: int | None = None
    weighted: tuple[WeightedSource, ...] = ()
    # kept from call to call: the windows of documents, and the starts of the batches to come
    _documents: dict[tuple[int, int], DocumentWindows] = field(default_factory=dict, repr=False)
    _ahead: dict[tuple[Any, ...], tuple[int, Numbers]] = field(default_factory=dict, repr=False)

    def require(self, context_length: int) -> None:
        """Raise InputError unless one window and its shifted targets fit, in each source too."""
        if len(self.tokens) < context_length + 1:
            raise InputError(
                f"{self.name} split has {len(self.tokens)} tokens, needs at least "
                f"{context_length + 1}; lower model.context_length or add text"
            )
        for source in self.weighted:
            if source.stop - source.start < context_length + 1:
                raise InputError(
                    f"source {source.name} has {source.stop - source.start} tokens in the "
                    f"{self.name} split, needs at least {context_length + 1}; lower "
                    "model.context_length, add text or leave the source out"
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
        "epochs" deals adjoining windows and "documents" windows that cut each document from its
        start: each window once an epoch, in a new order each time. Sources with weights have
        exact shares of the windows, and epochs of their own.
        """
        kind = batch_size, context_length, seed, sampling
        first, ahead = self._ahead.get(kind, (step, np.empty((0, batch_size), dtype=np.int64)))
        if not 0 <= step - first < len(ahead):
            # many batches cost little more than one, but a single call may be all there is
            n_steps = max(1, WINDOWS_AHEAD // batch_size) if kind in self._ahead else 1
            first, ahead = step, self._compute_starts(range(step, step + n_steps), *kind)
            self._ahead[kind] = first, ahead
        return ahead[step - first]

    def _compute_starts(
        self, steps: range, batch_size: int, context_length: int, seed: int, sampling: WindowOrder
    ) -> NDArray[np.int64]:
        """Compute `starts` of some steps at once, (len(steps), batch_size)."""
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
                    places = drawn(seed, steps, batch_size, size)[mine]
                case "epochs" | "documents":
                    places = ordered(seed, numbers[mine], size, *stream)
                case _:
                    assert_never(sampling)
            starts[mine] = source.start + start_of(places)
        return starts.reshape(-1, batch_size)

    def _windows_of(
        self, source: WeightedSource, context_length: int, sampling: WindowOrder
    ) -> tuple[int, Callable[[Numbers], Numbers]]:
        """Return the number of windows of a source, and a function of their numbers to starts."""
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
                raise InputError("sampling = documents: the id that ends a document is not known")
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
class Tokens:
    """An opened data/tokens folder."""

    train: Split
    valid: Split
    vocab_size: int


def open_tokens(
    folder: Path, tokenizer_sha256: str | None = None, tokenizer: Tokenizer | None = None
) -> Tokens:
    """Open data/tokens and verify its files by tokens.json.

    Raises InputError if one is missing, truncated, extended or edited, has ids beyond the
    vocabulary, or if the tokens were made with another tokenizer than the given one.
    """
    manifest = read_manifest(folder)
    if tokenizer_sha256 not in (None, manifest["tokenizer_sha256"]):
        raise InputError(f"{folder}: made with another tokenizer; {REMEDY}")
    for name in ("vocab_size", "end_id") if tokenizer is not None else ():
        if manifest[name] != getattr(tokenizer, name):
            raise InputError(
                f"{folder / MANIFEST}: {name} = {manifest[name]}, the tokenizer's is "
                f"{getattr(tokenizer, name)}; {REMEDY}"
            )
    train, valid = (_open_split(folder, split, manifest) for split in SPLITS)
    return Tokens(train, valid, manifest["vocab_size"])


def _open_split(folder: Path, name: str, manifest: dict[str, Any]) -> Split:
    dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    entries = [shard[name] for shard in manifest["shards"]]
    files = [folder / entry["file"] for entry in entries]
    tokens = TokenStream(files, entries, dtype, manifest["vocab_size"])
    weighted = _weighted(name, manifest) if name == "train" else ()  # shares are of the training
    return Split(name, tokens, manifest[name]["bytes"], manifest["end_id"], weighted)


def _weighted(split: str, manifest: dict[str, Any]) -> tuple[WeightedSource, ...]:
    """Return the place of each source in a split, if sources have weights."""
    sources, start = [], 0
    for source in manifest["sources"]:
        shards = [shard for shard in manifest["shards"] if shard["source"] == source["name"]]
        stop = start + sum(shard[split]["tokens"] for shard in shards)
        if source["weight"] is not None:
            sources.append(WeightedSource(source["name"], start, stop, float(source["weight"])))
        start = stop
    return tuple(sources)
