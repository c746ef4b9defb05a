"""gigatoken, guarded: the ids and the merges of `tokenizers`, fifty times as fast.

    Tokenizer --Gigatoken(tokenizer)--> encode(texts) --> ids
    training text --learn(joined)--> the backend that `tokenizers` would learn

What a tokenizer.json means is what `tokenizers` makes of it. gigatoken is young, and its faults are
known here alone: it is missing on some platforms, refuses or misreads some tokenizers (so it has to
pass a trial), knows characters of Unicode 17 (so texts that hold one are kept from it), keeps every
word that it saw (so it is renewed), loses empty texts (so texts are counted), makes up merges when
pairs run out (so the last one is looked for), and may have faults that nobody has met (so a sample
of every call is compared). It works on the calling thread alone.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import orjson
import psutil
import tokenizers
from numpy.typing import NDArray
from tokenizers import models

from lm.data.tokenizer import Tokenizer, byte_characters, byte_level_backend

# Letters, marks and digits of Unicode 17, which gigatoken knows and tokenizers (16) does not.
NEWER_CHARACTERS = re.compile(
    "[\u088f\u0c5c\u0cdc\u1acf-\u1add\u1ae0-\u1aeb\ua7ce\ua7cf\ua7d2\ua7d4\ua7f1"
    "\U00010940-\U00010959\U00010ec5-\U00010ec7\U00010efa\U00010efb\U00011b60-\U00011b67"
    "\U00011db0-\U00011ddb\U00011de0-\U00011de9\U00016ea0-\U00016eb8\U00016ebb-\U00016ed3"
    "\U00016ff2-\U00016ff6\U000187f8-\U000187ff\U00018d09-\U00018d1e\U00018d80-\U00018df2"
    "\U0001e6c0-\U0001e6de\U0001e6e0-\U0001e6f5\U0001e6fe\U0001e6ff\U0002b73a-\U0002b73f"
    "\U0002cea2-\U0002cead\U000323b0-\U00033479]"
)
NEWER_LEADS = b"\xe0\xe1\xea\xf0"  # the first byte of each in UTF-8; rare in most text

Encoded = tuple[NDArray[np.uint32], NDArray[np.int64]]  # ids of all texts, count of each

SAMPLED = 1 << 11  # one byte in so many is encoded by both: 2 % of the time
CACHE_BYTES = 250 << 20  # of words it saw: random ones take 6 times their size
SHORT_RUN = 50_000  # texts; importing awkward, for batches, takes as long as they save on these
LARGE_BYTES = 32 << 20  # of text: below, its training is slower, it is quadratic in ties
LARGE_VOCAB_SIZE = (1 << 15) + 256  # above, ties are too many again
HARD_TEXTS = [
    "".join(map(chr, [*range(0x3000), *range(0x3000, 0xD800, 7), *range(0xE000, 0x110000, 0x400)])),
    *(character * n for character in " \n\t\r\0a1.é東🙂" for n in (1, 2, 3, 4, 15, 16, 17, 257)),
    *(f"{a}{b}{a}  {b} \n{a}" for a in " \n\t\ra1.'東🙂" for b in "bÉ٣'\r\u00a0\u200b\u0301"),
    "It's we'll I'VE they'd 'twas x's'' don''t ''s 's\n's '\u017f 'ß '\ufb06 '\u017fx",
    "1 12 123 1234 12345 123456 1e-5 0x1F 3.14159 १२३४५ ٣٤٥ ½ Ⅷ 1,000,000",
    "def f(x):\n    return {'a': x[0] != 1}  # ok\r\n\tif(!x){a->b();}//c\n\n\n  \n end ",
    "naïve café Ωμέγα мир مرحبا שלום नमस्ते 東京は日本の首都です。中文\uff0c标点。한국어",
    "e\u0301 \ufb01 \u200b \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
]


class Unusable(Exception):
    """gigatoken cannot be had or must not be used, for the reason given."""


class EncodersDiffer(Exception):
    """gigatoken gave other ids than `tokenizers`: start again with the latter."""


# --- encoding ---------------------------------------------------------------------------


class Gigatoken:
    """Encodes texts with gigatoken, and those that it would misread with `tokenizers`."""

    def __init__(self, tokenizer: Tokenizer):
        """Raise Unusable if gigatoken is missing, refuses this tokenizer or fails the trial."""
        self.tokenizer = tokenizer
        self._n_encoded = 0  # texts
        settings = orjson.loads(tokenizer.backend.to_str())
        added = settings["added_tokens"]
        settings["added_tokens"] = [token for token in added if not token["special"]]
        self._json = orjson.dumps(settings)
        try:
            self._renew()
        except ImportError:
            raise Unusable("gigatoken is not installed") from None
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0][:200]
            raise Unusable(f"gigatoken refuses this tokenizer: {reason}") from None
        self._try_hard_texts([token["content"] for token in added])

    def encode(self, texts: list[bytes]) -> Encoded:
        """Return the ids of texts one after the other, and the count of each.

        Raises EncodersDiffer if a text got lost.
        """
        if _resident_bytes() > self._rss + CACHE_BYTES:
            self._renew()
        ids, lengths = self._encode(texts)
        if len(lengths) != len(texts):
            raise EncodersDiffer(f"gigatoken made {len(lengths)} texts of {len(texts)}")
        return ids, lengths

    def compare_sample(
        self, texts: list[bytes], ids: NDArray[np.uint32], lengths: NDArray[np.int64]
    ) -> None:
        """Encode some texts, from anywhere among them on, and the beginning of one, by both.

        Raises EncodersDiffer if gigatoken gives other ids than `tokenizers`.
        """
        total, starts = sum(map(len, texts)), np.cumsum(lengths) - lengths
        left = max(256, total // SAMPLED)
        for i in (total + np.arange(len(texts))) % len(texts):
            text = texts[i][:left].decode("utf-8", "ignore").encode()
            if len(text) == len(texts[i]):
                found = ids[starts[i] : starts[i] + lengths[i]]
            else:
                found, _ = self.encode([text])
            if not np.array_equal(found, by_tokenizers(self.tokenizer, [text])[0]):
                raise EncodersDiffer(f"gigatoken gives other ids for {text.decode()[:50]!r}")
            left -= len(text)
            if left < 4:  # bytes, the longest character
                break

    def _encode(self, texts: list[bytes]) -> Encoded:
        if may_have_newer_characters(b"".join(texts)):  # hardly ever: so not of each
            return _joined(
                by_tokenizers(self.tokenizer, [text])[0]
                if has_newer_characters(text)
                else self._library.encode(text)
                for text in texts
            )
        self._n_encoded += len(texts)
        if self._n_encoded < SHORT_RUN:
            return _joined(self._library.encode(text) for text in texts)
        lists = self._library.encode_batch(texts, parallel=False).layout
        return lists.content.data, np.diff(lists.offsets.data)

    def _renew(self) -> None:
        """Open gigatoken anew, its cache empty."""
        import gigatoken  # not on every platform

        self._library: Any = None  # lets go of the old one first
        self._library = gigatoken.Tokenizer.from_json(self._json)
        self._rss = _resident_bytes()

    def _try_hard_texts(self, added: list[str]) -> None:
        """Raise Unusable unless texts that are hard to cut into words have the right ids."""
        names = "".join(f"a  {name}  b{name}c\n{name}\n" for name in added)
        hard = [NEWER_CHARACTERS.sub("", text) for text in HARD_TEXTS]
        for text in filter(None, [*hard, names]):
            expected, _ = by_tokenizers(self.tokenizer, [text.encode()])
            if not np.array_equal(self.encode([text.encode()])[0], expected):
                raise Unusable(f"gigatoken gives other ids for {text[:20]!r}")


def by_tokenizers(tokenizer: Tokenizer, texts: list[bytes]) -> Encoded:
    """Return the ids that `tokenizers` gives, which are right by definition."""
    encoded = tokenizer.encode_batch([text.decode() for text in texts])
    return np.fromiter(chain(*encoded), np.uint32), np.fromiter(map(len, encoded), np.int64)


def _joined(parts: Iterator[NDArray[np.uint32]]) -> Encoded:
    encoded = list(parts)
    return np.concatenate(encoded), np.fromiter(map(len, encoded), np.int64)


def _resident_bytes() -> int:
    """Return the memory of this very process, a fork perhaps of the one that opened gigatoken."""
    return int(psutil.Process().memory_info().rss)


# --- learning ---------------------------------------------------------------------------


def learn(joined: bytes, vocab_size: int) -> tokenizers.Tokenizer | None:
    """Return what `tokenizers` learns from documents that are joined by NUL, without an end token.

    None if that one does it as fast, if gigatoken is missing, or if pairs run out before there are
    `vocab_size` tokens. No document may hold a newer character: see `without_newer_characters`.
    """
    if len(joined) < LARGE_BYTES or vocab_size > LARGE_VOCAB_SIZE:
        return None
    try:
        import gigatoken  # not on every platform
    except ImportError:
        return None
    with _streams_closed():
        _, pairs = gigatoken.train_bpe(joined, vocab_size, [], "huggingface", b"\0")
    characters = byte_characters()
    merges = [
        ("".join(characters[b] for b in left), "".join(characters[b] for b in right))
        for left, right in pairs
    ]
    vocabulary = {character: i for i, character in enumerate(sorted(characters))}
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    backend = byte_level_backend(models.BPE(vocab=vocabulary, merges=merges), use_regex=True)
    encode = gigatoken.Tokenizer.from_json(backend.to_str()).encode
    # when pairs run out it goes on with some that no longer occur: then nothing has the last id
    if not any(vocab_size - 1 in encode(document) for document in split_at_nul(joined)):
        return None
    return backend


def without_newer_characters(joined: bytes) -> bytes:
    """Leave out the documents with characters that gigatoken alone knows; all if it is too short.

    `tokenizers` leaves them out as well, so that both learn the same.
    """
    if len(joined) < LARGE_BYTES or not any(map(has_newer_characters, split_at_nul(joined))):
        return joined
    return b"\0".join(text for text in split_at_nul(joined) if not has_newer_characters(text))


def split_at_nul(joined: bytes) -> Iterator[bytes]:
    """Return the documents between NULs one at a time, so that memory holds no second copy."""
    start = 0
    while start <= len(joined):
        end = joined.find(b"\0", start)
        end = len(joined) if end < 0 else end
        yield joined[start:end]
        start = end + 1


@contextmanager
def _streams_closed() -> Iterator[None]:
    """Let what a library prints past Python, to stdout and stderr, go nowhere."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [(stream, os.dup(stream)) for stream in (1, 2)]
    with open(os.devnull, "wb") as nowhere:
        for stream, _ in saved:
            os.dup2(nowhere.fileno(), stream)
    try:
        yield
    finally:
        for stream, copy in saved:
            os.dup2(copy, stream)
            os.close(copy)


# --- characters of Unicode 17 -----------------------------------------------------------


def has_newer_characters(text: bytes) -> bool:
    """Return whether UTF-8 holds a character that gigatoken knows and `tokenizers` does not."""
    return may_have_newer_characters(text) and bool(NEWER_CHARACTERS.search(text.decode()))


def may_have_newer_characters(text: bytes) -> bool:
    """Return the same at gigabytes a second, by two bytes of each; there are few false alarms."""
    data = np.frombuffer(text, np.uint8)
    return any(
        _newer_beginnings()[lead, data[np.flatnonzero(data == lead) + 1]].any()
        for lead in NEWER_LEADS
        if lead in text
    )


@cache
def _newer_beginnings() -> NDArray[np.bool_]:
    """Mark each pair of first two bytes with which some newer character begins, (256, 256)."""
    table = np.zeros((256, 256), dtype=bool)
    for code in range(0x800, 0x40000, 0x40):  # the last byte of UTF-8 holds six bits
        block = "".join(map(chr, range(code, code + 0x40)))
        if NEWER_CHARACTERS.search(block):
            table[tuple(chr(code).encode()[:2])] = True
    return table
