"""Token ids on disk, and batches dealt from them.

    documents --write_tokens--> train.bin valid.bin tokens.json --open_tokens--> Split.batch(step)

A .bin file holds little-endian ids, uint16 where the vocabulary allows, else uint32; every
document is followed by the end token. tokens.json says what the files hold. It is written last:
a folder without it is not finished.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from lm import rng
from lm.errors import InputError
from lm.files import read_json, sha256_file, write_json, writing
from lm.tokenizer import Tokenizer

FORMAT = 1
BATCH_BYTES = 1 << 22  # text handed to the tokenizer at once: enough for all cores
_MANIFEST_KEYS = {"format", "dtype", "vocab_size", "tokenizer_sha256", "train", "valid"}
_REMEDY = "run `dvc repro tokens`"
Sampling = Literal["random", "epochs"]


class _Writer:
    """Appends the ids of one split to its file and counts what passes."""

    def __init__(self, file: BinaryIO, dtype: np.dtype[Any], tokenizer: Tokenizer):
        self.file, self.dtype, self.tokenizer = file, dtype, tokenizer
        self.sha256 = hashlib.sha256()
        self.n_tokens = self.n_bytes = self.n_documents = 0

    def append(self, documents: list[tuple[str, str]]) -> None:
        encoded = self.tokenizer.encode_batch([text for _, text in documents])
        for (name, text), ids in zip(documents, encoded, strict=True):
            size, kept = len(text.encode()), self.tokenizer.byte_lengths[ids].sum()
            if size != kept:
                raise InputError(
                    f"{name}: {size} bytes of text became tokens of {kept} bytes; "
                    "this tokenizer alters text, choose another tokenizer.kind or source"
                )
            data = np.array([*ids, self.tokenizer.end_id], dtype=self.dtype).tobytes()
            self.file.write(data)
            self.sha256.update(data)
            self.n_tokens += len(ids) + 1
            self.n_bytes += size
            self.n_documents += 1

    def summary(self) -> dict[str, Any]:
        return {
            "tokens": self.n_tokens,
            "bytes": self.n_bytes,
            "documents": self.n_documents,
            "sha256": self.sha256.hexdigest(),
        }


def write_tokens(
    folder: Path,
    documents: Iterable[tuple[str, tuple[str, str]]],
    tokenizer: Tokenizer,
    tokenizer_sha256: str,
) -> dict[str, Any]:
    """Encode (split, (name, text)) into `folder`; returns what tokens.json then says.

    Raises InputError if the tokenizer does not keep the text's bytes.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokens.json").unlink(missing_ok=True)
    paths = folder / "train.bin", folder / "valid.bin"
    with writing(paths[0]), open(paths[0], "wb") as train, open(paths[1], "wb") as valid:
        writers = {
            "train": _Writer(train, dtype, tokenizer),
            "valid": _Writer(valid, dtype, tokenizer),
        }
        for batch in _batches(documents):
            for split, writer in writers.items():
                writer.append([document for name, document in batch if name == split])
    manifest = {
        "format": FORMAT,
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "end_id": tokenizer.end_id,
        "tokenizer_sha256": tokenizer_sha256,
        **{split: writer.summary() for split, writer in writers.items()},
    }
    write_json(folder / "tokens.json", manifest)
    return manifest


def _batches(
    documents: Iterable[tuple[str, tuple[str, str]]],
) -> Iterator[list[tuple[str, tuple[str, str]]]]:
    batch, size = [], 0
    for split, document in documents:
        batch.append((split, document))
        size += len(document[1])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


class TokenFile:
    """A .bin file as a 1-D array of ids that stay on disk: len() and slices.

    A slice is read, not mapped: from a mapped file that somebody truncates, the next access ends
    the process with SIGBUS and no word. Copying a window costs no more than mapping it.
    """

    def __init__(self, file: Path, dtype: np.dtype[Any]):
        self.file, self.dtype = file, dtype
        self._descriptor = os.open(file, os.O_RDONLY)
        self._length = os.fstat(self._descriptor).st_size // dtype.itemsize

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: slice) -> NDArray[Any]:
        """The ids of a slice without a step. Raises InputError if the file has become shorter."""
        start, stop, _ = place.indices(self._length)
        ids = np.empty(max(0, stop - start), dtype=self.dtype)
        view, offset = ids.data.cast("B"), start * self.dtype.itemsize
        while view:  # one call reads at most 2 GiB
            size = os.preadv(self._descriptor, [view], offset)
            if size == 0:
                raise InputError(f"{self.file}: became shorter while it was read; {_REMEDY}")
            view, offset = view[size:], offset + size
        return ids

    def __del__(self) -> None:
        os.close(self._descriptor)


@dataclass(frozen=True)
class Split:
    """The tokens of one split, on disk, and the batches dealt from them."""

    name: str
    tokens: NDArray[Any] | TokenFile  # (n_tokens,), uint16 or uint32
    n_bytes: int

    def require(self, context_length: int) -> None:
        """Raises InputError unless one window and its shifted targets fit."""
        if len(self.tokens) < context_length + 1:
            raise InputError(
                f"{self.name} split has {len(self.tokens)} tokens, needs at least "
                f"{context_length + 1}; lower model.context_length or add text"
            )

    def batch(
        self, step: int, batch_size: int, context_length: int, seed: int, sampling: Sampling
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Batch number `step` (from 0): x and the targets y, both (batch_size, context_length)."""
        starts = self.starts(step, batch_size, context_length, seed, sampling)
        return windows(self.tokens, starts, context_length)

    def starts(
        self, step: int, batch_size: int, context_length: int, seed: int, sampling: Sampling
    ) -> NDArray[np.int64]:
        """The places of the first token of each window of a batch, (batch_size,).

        A pure function of (seed, step). "random": windows anywhere, drawn with replacement.
        "epochs": adjoining windows, each seen exactly once an epoch, in a new order each time.
        """
        self.require(context_length)
        if sampling == "random":
            key = rng.seed(seed, "batch", step)
            return rng.random_integers(key, batch_size, len(self.tokens) - context_length)
        n_windows = (len(self.tokens) - 1) // context_length
        epochs, places = np.divmod(step * batch_size + np.arange(batch_size), n_windows)
        starts = np.empty(batch_size, dtype=np.int64)
        for epoch in np.unique(epochs):
            mine, key = epochs == epoch, rng.seed(seed, "epoch", int(epoch))
            starts[mine] = rng.permuted(key, places[mine], n_windows) * context_length
        return starts


def windows(
    tokens: NDArray[Any] | TokenFile, starts: NDArray[np.int64], context_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The windows at `starts` (B,) as x (B, T), and as y (B, T) the same one token later."""
    rows = np.empty((len(starts), context_length + 1), dtype=np.int64)
    for row, start in zip(rows, starts, strict=True):
        row[:] = tokens[start : start + context_length + 1]
    return rows[:, :-1], rows[:, 1:]


@dataclass(frozen=True)
class Tokens:
    """An opened data/tokens folder."""

    train: Split
    valid: Split
    vocab_size: int


def open_tokens(folder: Path, tokenizer_sha256: str | None = None) -> Tokens:
    """The token files, checked against tokens.json.

    Raises InputError if a file is missing, truncated, extended or edited, and if the tokens were
    made with another tokenizer than the one whose hash is given.
    """
    manifest = read_json(folder / "tokens.json")
    if not _is_manifest(manifest):
        raise InputError(f"{folder / 'tokens.json'}: not a token manifest; run `dvc repro tokens`")
    if manifest["format"] > FORMAT:
        raise InputError(
            f"{folder / 'tokens.json'}: written by a newer version (format {manifest['format']}, "
            f"this one reads <= {FORMAT})"
        )
    if tokenizer_sha256 not in (None, manifest["tokenizer_sha256"]):
        raise InputError(f"{folder}: made with another tokenizer; run `dvc repro tokens`")
    return Tokens(
        _open_split(folder, "train", manifest),
        _open_split(folder, "valid", manifest),
        manifest["vocab_size"],
    )


def _is_manifest(value: Any) -> bool:
    if not (isinstance(value, dict) and value.keys() >= _MANIFEST_KEYS):
        return False
    splits = (value["train"], value["valid"])
    return value["dtype"] in ("uint16", "uint32") and all(
        isinstance(split, dict)
        and isinstance(split.get("sha256"), str)
        and all(isinstance(split.get(key), int) for key in ("tokens", "bytes"))
        for split in splits
    )


def _open_split(folder: Path, name: str, manifest: dict[str, Any]) -> Split:
    file, entry = folder / f"{name}.bin", manifest[name]
    dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    expected = entry["tokens"] * dtype.itemsize
    if not file.is_file():
        raise InputError(f"{file}: no such file; {_REMEDY}")
    if file.stat().st_size != expected:
        raise InputError(
            f"{file}: {file.stat().st_size} bytes, tokens.json says {expected}; {_REMEDY}"
        )
    if sha256_file(file) != entry["sha256"]:
        raise InputError(f"{file}: content differs from the hash in tokens.json; {_REMEDY}")
    return Split(name, TokenFile(file, dtype), entry["bytes"])
