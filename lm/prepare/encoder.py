"""Documents to token ids at a hundred megabytes a second and core, under guard.

    documents, as bytes --Encoder.encode--> the ids of all, and how many each has

What a tokenizer.json means is what `tokenizers` makes of it. `gigatoken` gives the same ids fifty
times as fast, but is young. So it has to pass a trial; documents with characters of Unicode 17,
which it alone knows, are kept from it; of every call a sample is compared; the bytes behind the ids
are counted for every document; and where it is refused or missing, `tokenizers` does the work. All
on the calling thread: this is made for worker processes.
"""

import os
import re
from collections.abc import Iterator
from functools import cache
from itertools import chain, islice, pairwise
from typing import Any, Literal

import numpy as np
import orjson
import psutil
from numpy.typing import NDArray

from lm.base.errors import InputError
from lm.data.tokenizer import Tokenizer

# Letters, marks and digits of Unicode 17, which gigatoken knows and tokenizers (16) does not.
NEWER_CHARACTERS = re.compile(
    "[\u088f\u0c5c\u0cdc\u1acf-\u1add\u1ae0-\u1aeb\ua7ce\ua7cf\ua7d2\ua7d4\ua7f1"
    "\U00010940-\U00010959\U00010ec5-\U00010ec7\U00010efa\U00010efb\U00011b60-\U00011b67"
    "\U00011db0-\U00011ddb\U00011de0-\U00011de9\U00016ea0-\U00016eb8\U00016ebb-\U00016ed3"
    "\U00016ff2-\U00016ff6\U000187f8-\U000187ff\U00018d09-\U00018d1e\U00018d80-\U00018df2"
    "\U0001e6c0-\U0001e6de\U0001e6e0-\U0001e6f5\U0001e6fe\U0001e6ff\U0002b73a-\U0002b73f"
    "\U0002cea2-\U0002cead\U000323b0-\U00033479]"
)
_NEWER_LEADS = b"\xe0\xe1\xea\xf0"  # the first byte of each in UTF-8; rare in most text

Library = Literal["gigatoken", "tokenizers"]
Encoded = tuple[NDArray[np.uint32], NDArray[np.int64]]  # ids of all texts, count of each

GROUP_BYTES = 1 << 20  # encoded at once: `tokenizers` takes 140 bytes of memory for each
SAMPLED = 1 << 11  # one byte in so many is encoded by both: 2 % of the time
RUN_BYTES = 1 << 24  # of a document that cannot be cut: gigatoken takes 25 bytes for each, too
CACHE_BYTES = 250 << 20  # gigatoken keeps every word it saw: random ones take 6 times their size
SHORT_RUN = 50_000  # documents; importing awkward, for batches, takes as long as they save on these
_AFTER_A_WORD = re.compile(rb"[^\s](?=[ \n]|\xe3\x80\x82|\xef\xbc\x8c)")  # the last two: 。，
_HARD_TEXTS = [
    "".join(map(chr, [*range(0x3000), *range(0x3000, 0xD800, 7), *range(0xE000, 0x110000, 0x400)])),
    *(character * n for character in " \n\t\r\0a1.é東🙂" for n in (1, 2, 3, 4, 15, 16, 17, 257)),
    *(f"{a}{b}{a}  {b} \n{a}" for a in " \n\t\ra1.'東🙂" for b in "bÉ٣'\r\u00a0\u200b\u0301"),
    "It's we'll I'VE they'd 'twas x's'' don''t ''s 's\n's '\u017f 'ß '\ufb06 '\u017fx",
    "1 12 123 1234 12345 123456 1e-5 0x1F 3.14159 १२३४५ ٣٤٥ ½ Ⅷ 1,000,000",
    "def f(x):\n    return {'a': x[0] != 1}  # ok\r\n\tif(!x){a->b();}//c\n\n\n  \n end ",
    "naïve café Ωμέγα мир مرحبا שלום नमस्ते 東京は日本の首都です。中文\uff0c标点。한국어",
    "e\u0301 \ufb01 \u200b \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
]


class DocumentRefused(InputError):
    """One of the documents cannot be encoded; `index` says which of those given."""

    def __init__(self, index: int, reason: str):
        super().__init__(index, reason)
        self.index, self.reason = index, reason

    def __str__(self) -> str:
        return self.reason


class EncodersDiffer(Exception):
    """gigatoken gave other ids than `tokenizers`: start again with the latter."""


class Encoder:
    """Encodes documents with the fastest library that gives this tokenizer's ids."""

    def __init__(self, tokenizer: Tokenizer, library: Library | None = None):
        """None takes gigatoken where it can be had; else `why_not` says why it was refused."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
        self.tokenizer = tokenizer
        self._byte_lengths = tokenizer.byte_lengths.astype(np.int32)  # half the memory to fill
        self.library: Library = "tokenizers"
        self.why_not = None if library is None else f"{library} was asked for"
        self._n_encoded = 0  # documents
        if library != "tokenizers":
            self.why_not = self._start_gigatoken()
            if self.why_not is None:
                self.library = "gigatoken"
            elif library == "gigatoken":
                raise InputError(self.why_not)

    def encode(self, documents: list[bytes]) -> Encoded:
        """The ids of documents one after the other, without end tokens, and the count of each.

        The documents are UTF-8 and not empty. Raises DocumentRefused if the tokens of one do not
        spell it or it has no place to cut it in RUN_BYTES, EncodersDiffer if gigatoken gives other
        ids than `tokenizers` for a sample.
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
                f"{sizes[i]} bytes of text became tokens of {kept[i]} bytes; "
                "this tokenizer alters text, choose another tokenizer.kind or source",
            )
        if self.library == "gigatoken":
            self._compare_sample(documents, sizes, ids, lengths)
        return ids, lengths

    def _encode(
        self, texts: list[bytes]
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]]:
        """The ids of texts, a group at a time; how many each has; how many bytes those spell."""
        group = np.cumsum(_sizes(texts)) // GROUP_BYTES
        edges = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(texts)]
        encode = self._by_gigatoken if self.library == "gigatoken" else self._by_tokenizers
        encoded = [encode(texts[start:end]) for start, end in pairwise(edges)]
        kept = np.concatenate([self._spelled(ids, lengths) for ids, lengths in encoded])
        ids, lengths = (np.concatenate(parts) for parts in zip(*encoded, strict=True))
        if len(lengths) != len(texts):
            raise EncodersDiffer(f"{self.library} made {len(lengths)} texts of {len(texts)}")
        return ids, lengths, kept

    def _spelled(self, ids: NDArray[np.uint32], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        kept = np.zeros(len(lengths), np.int64)
        some = lengths > 0  # a foreign tokenizer may drop a text
        if some.any():
            in_bytes = self._byte_lengths.take(ids)
            kept[some] = np.add.reduceat(in_bytes, _starts(lengths)[some], dtype=np.int64)
        return kept

    def _by_tokenizers(self, texts: list[bytes]) -> Encoded:
        encoded = self.tokenizer.encode_batch([text.decode() for text in texts])
        return np.fromiter(chain(*encoded), np.uint32), _sizes(encoded)

    def _by_gigatoken(self, texts: list[bytes]) -> Encoded:
        if _resident_bytes() > self._rss + CACHE_BYTES:
            self._open_gigatoken()
        if may_have_newer_characters(b"".join(texts)):  # hardly ever: so not of each
            encoded = [
                self._by_tokenizers([text])[0]
                if has_newer_characters(text)
                else self._gigatoken.encode(text)
                for text in texts
            ]
            return np.concatenate(encoded), _sizes(encoded)
        self._n_encoded += len(texts)
        if self._n_encoded < SHORT_RUN:
            encoded = [self._gigatoken.encode(text) for text in texts]
            return np.concatenate(encoded), _sizes(encoded)
        lists = self._gigatoken.encode_batch(texts, parallel=False).layout
        return lists.content.data, np.diff(lists.offsets.data)

    def _start_gigatoken(self) -> str | None:
        """Open it and try it on hard texts; returns why it cannot be used."""
        settings = orjson.loads(self.tokenizer.backend.to_str())
        added = settings["added_tokens"]
        settings["added_tokens"] = [token for token in added if not token["special"]]
        self._json = orjson.dumps(settings)
        try:
            self._open_gigatoken()
        except ImportError:
            return "gigatoken is not installed"
        except (RuntimeError, ValueError) as error:
            return f"gigatoken refuses this tokenizer: {str(error).splitlines()[0][:200]}"
        names = "".join(f"a  {t['content']}  b{t['content']}c\n{t['content']}\n" for t in added)
        hard = [NEWER_CHARACTERS.sub("", text) for text in _HARD_TEXTS]
        texts = [text.encode() for text in [*hard, names] if text]
        for text in texts:
            expected, _ = self._by_tokenizers([text])
            if not np.array_equal(self._by_gigatoken([text])[0], expected):
                return f"gigatoken gives other ids for {text.decode()[:20]!r}"
        return None

    def _open_gigatoken(self) -> None:
        """A fresh one, its cache empty."""
        import gigatoken  # not on every platform

        self._gigatoken: Any = None  # lets go of the old one first
        self._gigatoken = gigatoken.Tokenizer.from_json(self._json)
        self._rss = _resident_bytes()

    def _pieces(self, index: int, document: bytes) -> list[bytes]:
        """A document in pieces whose ids, one after the other, are the document's.

        Byte-level patterns part a word from the white space after it; that this one does is tried
        at every cut.
        """
        places = [0]
        while len(document) - places[-1] > GROUP_BYTES:
            ends = _word_ends(document, places[-1] + GROUP_BYTES, places[-1] + RUN_BYTES)
            place = next((end for end in ends if self._is_cut(document, end)), len(document))
            if place - places[-1] > RUN_BYTES:
                raise DocumentRefused(
                    index,
                    f"{RUN_BYTES >> 20} MiB without a place where the tokenizer can cut it; "
                    "break its lines, or leave it out if it is no text",
                )
            places.append(place)
        places += [len(document)] if places[-1] < len(document) else []
        return [document[start:end] for start, end in pairwise(places)]

    def _is_cut(self, document: bytes, at: int) -> bool:
        """Whether the text just before and the text just after make the ids of both together."""
        before, after = (
            part.decode("utf-8", "ignore").encode()  # whole characters
            for part in (document[at - 500 : at], document[at : at + 500])
        )
        both, *_ = self._encode([before + after])
        return np.array_equal(both, self._encode([before, after])[0])

    def _compare_sample(
        self,
        documents: list[bytes],
        sizes: NDArray[np.int64],
        ids: NDArray[np.uint32],
        lengths: NDArray[np.int64],
    ) -> None:
        """Encode some documents, from anywhere among them on, and the beginning of one, by both."""
        total, starts = int(sizes.sum()), _starts(lengths)
        left = max(256, total // SAMPLED)
        for i in (total + np.arange(len(documents))) % len(documents):
            text = documents[i][:left].decode("utf-8", "ignore").encode()
            if len(text) == sizes[i]:
                found = ids[starts[i] : starts[i] + lengths[i]]
            else:
                found, *_ = self._encode([text])
            if not np.array_equal(found, self._by_tokenizers([text])[0]):
                raise EncodersDiffer(f"gigatoken gives other ids for {text.decode()[:50]!r}")
            left -= len(text)
            if left < 4:  # bytes, the longest character
                break


def _word_ends(document: bytes, start: int, stop: int) -> Iterator[int]:
    """Places for a cut, a hundred in 64 KiB: each costs, and a tokenizer may join all words."""
    for at in range(start, min(stop, len(document)), 1 << 16):
        found = _AFTER_A_WORD.finditer(document, at, at + (1 << 16))
        yield from (match.end() for match in islice(found, 100))


def _resident_bytes() -> int:
    """Of this very process, which may be a fork of the one that opened the library."""
    return int(psutil.Process().memory_info().rss)


def _sizes(items: list[Any]) -> NDArray[np.int64]:
    return np.fromiter(map(len, items), np.int64, len(items))


def _starts(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.cumsum(lengths) - lengths


def has_newer_characters(text: bytes) -> bool:
    """Whether UTF-8 holds a character that gigatoken knows and tokenizers does not."""
    return may_have_newer_characters(text) and bool(NEWER_CHARACTERS.search(text.decode()))


def may_have_newer_characters(text: bytes) -> bool:
    """The same at gigabytes a second, with a few false alarms: by the first two bytes of each."""
    data = np.frombuffer(text, np.uint8)
    return any(
        _newer_beginnings()[lead, data[np.flatnonzero(data == lead) + 1]].any()
        for lead in _NEWER_LEADS
        if lead in text
    )


@cache
def _newer_beginnings() -> NDArray[np.bool_]:
    """For each first and each second byte, whether some newer character begins so, (256, 256)."""
    table = np.zeros((256, 256), dtype=bool)
    for code in range(0x800, 0x40000, 0x40):  # the last byte of UTF-8 holds six bits
        block = "".join(map(chr, range(code, code + 0x40)))
        if NEWER_CHARACTERS.search(block):
            table[tuple(chr(code).encode()[:2])] = True
    return table
