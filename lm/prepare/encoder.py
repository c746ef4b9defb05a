"""Encode documents to token ids, a hundred megabytes per second and core.

    documents, as bytes --Encoder.encode--> the ids of all, and the number of ids of each

gigatoken encodes where it can (gigatoken_guard.py), else `tokenizers`. The bytes behind the ids of
every document are counted, to notice a tokenizer that alters text. Everything runs on the calling
thread, since worker processes use it.
"""

import os
import re
from collections.abc import Iterator
from itertools import chain, islice, pairwise
from typing import Any, Literal, assert_never

import numpy as np
from numpy.typing import NDArray

from lm.base.errors import InputError
from lm.data.tokenizer import Tokenizer
from lm.prepare.gigatoken_guard import Encoded, Gigatoken, Unusable, by_tokenizers

Library = Literal["gigatoken", "tokenizers"]

GROUP_BYTES = 1 << 20  # encoded at once: `tokenizers` takes 140 bytes of memory for each byte
RUN_BYTES = 1 << 24  # encoded at once where no cut is possible: gigatoken takes 25 bytes for each
AFTER_A_WORD = re.compile(rb"[^\s](?=[ \n]|\xe3\x80\x82|\xef\xbc\x8c)")  # the last two: 。，


class DocumentRefused(InputError):
    """The document at `index` of those given cannot be encoded."""

    def __init__(self, index: int, reason: str):
        super().__init__(index, reason)
        self.index, self.reason = index, reason

    def __str__(self) -> str:
        return self.reason


class Encoder:
    """Encodes documents with the fastest library that gives this tokenizer's ids.

    `why_not` says why gigatoken is not used, or is None.
    """

    def __init__(self, tokenizer: Tokenizer, library: Library | None = None):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
        self.tokenizer = tokenizer
        self._byte_lengths = tokenizer.byte_lengths.astype(np.int32)  # half the memory to fill
        self._gigatoken: Gigatoken | None = None
        self.why_not: str | None = None
        match library:
            case "tokenizers":
                self.why_not = "tokenizers was requested"
            case "gigatoken" | None:
                try:
                    self._gigatoken = Gigatoken(tokenizer)
                except Unusable as error:
                    if library is not None:
                        raise InputError(str(error)) from None
                    self.why_not = str(error)
            case _:
                assert_never(library)

    def encode(self, documents: list[bytes]) -> Encoded:
        """Return the ids of documents one after the other, without end tokens, and their counts.

        The documents must be UTF-8 and not empty. Raises DocumentRefused if the tokens of one do
        not spell its text or if it cannot be cut within RUN_BYTES. Raises EncodersDiffer if
        gigatoken gives other ids than `tokenizers` for a sample.
        """
        if not documents:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        sizes = _sizes(documents)
        if sizes.max() > GROUP_BYTES:
            cut = [self._pieces(i, document) for i, document in enumerate(documents)]
            ids, *counts = self._encode(list(chain(*cut)))
            lengths, kept = (np.add.reduceat(count, _starts(_sizes(cut))) for count in counts)
        else:
            ids, lengths, kept = self._encode(documents)
        if not np.array_equal(sizes, kept):
            i = int((sizes != kept).argmax())
            raise DocumentRefused(
                i,
                f"{sizes[i]} bytes of text became tokens of {kept[i]} bytes: this tokenizer "
                "alters text; choose another tokenizer.kind or tokenizer.source",
            )
        if self._gigatoken:
            self._gigatoken.compare_sample(documents, ids, lengths)
        return ids, lengths

    def _encode(
        self, texts: list[bytes]
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]]:
        """Return the ids of texts, and for each text their number and the bytes that they spell."""
        group = np.cumsum(_sizes(texts)) // GROUP_BYTES
        edges = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(texts)]
        found = []
        for start, end in pairwise(edges):
            if self._gigatoken:
                ids, lengths = self._gigatoken.encode(texts[start:end])
            else:
                ids, lengths = by_tokenizers(self.tokenizer, texts[start:end])
            spelled = np.zeros(len(lengths), np.int64)
            some = lengths > 0  # a foreign tokenizer may drop a text
            if some.any():
                in_bytes = self._byte_lengths.take(ids)
                spelled[some] = np.add.reduceat(in_bytes, _starts(lengths)[some], dtype=np.int64)
            found.append((ids, lengths, spelled))
        ids, lengths, spelled = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return ids, lengths, spelled

    def _pieces(self, index: int, document: bytes) -> list[bytes]:
        """Cut a document into pieces whose ids, one after the other, are the document's.

        Byte-level patterns separate a word from the white space behind it; `_is_cut` tests that
        this tokenizer's does.
        """
        places = [0]
        while len(document) - places[-1] > GROUP_BYTES:
            ends = _word_ends(document, places[-1] + GROUP_BYTES, places[-1] + RUN_BYTES)
            place = next((end for end in ends if self._is_cut(document, end)), len(document))
            if place - places[-1] > RUN_BYTES:
                raise DocumentRefused(
                    index,
                    f"{RUN_BYTES >> 20} MiB without a place where the tokenizer can cut it; insert "
                    "line breaks, or leave the file out (data.glob) if it is not text",
                )
            places.append(place)
        places += [len(document)] if places[-1] < len(document) else []
        return [document[start:end] for start, end in pairwise(places)]

    def _is_cut(self, document: bytes, at: int) -> bool:
        """Return whether the text around a place has the same ids if it is cut there."""
        before, after = (
            part.decode("utf-8", "ignore").encode()  # whole characters
            for part in (document[max(0, at - 500) : at], document[at : at + 500])
        )
        both, *_ = self._encode([before + after])
        return np.array_equal(both, self._encode([before, after])[0])


def _word_ends(document: bytes, start: int, stop: int) -> Iterator[int]:
    """Yield places for a cut, 100 per 64 KiB at most: each is costly to try."""
    for at in range(start, min(stop, len(document)), 1 << 16):
        found = AFTER_A_WORD.finditer(document, at, at + (1 << 16))
        yield from (match.end() for match in islice(found, 100))


def _sizes(items: list[Any]) -> NDArray[np.int64]:
    return np.fromiter(map(len, items), np.int64, len(items))


def _starts(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.cumsum(lengths) - lengths
