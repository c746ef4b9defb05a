"""Use gigatoken with guards: the ids and the merges of `tokenizers`, fifty times as fast.

`tokenizers` defines what a tokenizer.json means. gigatoken is young; only this file knows its
faults:

- It is missing on some platforms, and refuses or misreads some tokenizers: it must pass a trial.
- It knows the characters of Unicode 17: texts with one of these go to `tokenizers`.
- It keeps every word that it has seen: it is opened again when it has grown.
- It loses empty texts: texts are counted.
- When pairs run out it invents merges: the last merge must occur in the text.
- It may have other faults: a sample of every call is compared.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain, groupby
from typing import Any

import numpy as np
import psutil
import tokenizers
from numpy.typing import NDArray
from tokenizers import models

from lm.data.tokenizer import Tokenizer, byte_characters, byte_level_backend, spelled

# Letters, marks and digits of Unicode 17, which gigatoken knows and tokenizers (16) does not
NEWER_CHARACTERS = re.compile(
    "[\u088f\u0c5c\u0cdc\u1acf-\u1add\u1ae0-\u1aeb\ua7ce\ua7cf\ua7d2\ua7d4\ua7f1"
    "\U00010940-\U00010959\U00010ec5-\U00010ec7\U00010efa\U00010efb\U00011b60-\U00011b67"
    "\U00011db0-\U00011ddb\U00011de0-\U00011de9\U00016ea0-\U00016eb8\U00016ebb-\U00016ed3"
    "\U00016ff2-\U00016ff6\U000187f8-\U000187ff\U00018d09-\U00018d1e\U00018d80-\U00018df2"
    "\U0001e6c0-\U0001e6de\U0001e6e0-\U0001e6f5\U0001e6fe\U0001e6ff\U0002b73a-\U0002b73f"
    "\U0002cea2-\U0002cead\U000323b0-\U00033479]"
)
# The first byte of these in UTF-8, and the second bytes that follow it
NEWER_BEGINNINGS = {
    0xE0: [0xA2, 0xB1, 0xB3],
    0xE1: [0xAB],
    0xEA: [0x9F],
    0xF0: [0x90, 0x91, 0x96, 0x98, 0x9E, 0xAB, 0xAC, 0xB2, 0xB3],
}
Encoded = tuple[NDArray[np.uint32], NDArray[np.int64]]  # ids of all texts, number of ids of each

SAMPLED = 1 << 11  # one byte of this many is compared: takes 2 % of the time
CACHE_BYTES = 250 << 20  # of words seen: random ones take 6 times their size
SHORT_RUN = 50_000  # texts: below, importing awkward takes longer than batches save
LARGE_BYTES = 32 << 20  # of text: below, training is slower, since it is quadratic in ties
LARGE_VOCAB_SIZE = (1 << 15) + 256  # above, there are too many ties again
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
    """gigatoken is missing or must not be used; the message says why."""


class EncodersDiffer(Exception):
    """gigatoken gave other ids than `tokenizers`: start again with `tokenizers`."""


class Gigatoken:
    """Encodes texts with gigatoken, or with `tokenizers` where gigatoken would misread them."""

    def __init__(self, tokenizer: Tokenizer):
        """Raise Unusable if gigatoken is missing, refuses this tokenizer or fails the trial."""
        self.tokenizer = tokenizer
        self._n_encoded = 0  # texts
        try:
            import orjson

            settings = orjson.loads(tokenizer.backend.to_str())
            added = settings["added_tokens"]
            settings["added_tokens"] = [token for token in added if not token["special"]]
            self._json = orjson.dumps(settings)
            self._open()
        except ImportError as error:
            raise Unusable(f"{error.name} is not installed") from None
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0][:200]
            raise Unusable(f"gigatoken refuses this tokenizer: {reason}") from None
        names = [token["content"] for token in added]
        for text in [*HARD_TEXTS, "".join(f"a  {name}  b{name}c\n{name}\n" for name in names)]:
            tried = [NEWER_CHARACTERS.sub("", text).encode()]
            if not np.array_equal(self.encode(tried)[0], by_tokenizers(tokenizer, tried)[0]):
                raise Unusable(f"gigatoken gives other ids for {text[:20]!r}")

    def _open(self) -> None:
        import gigatoken  # not on every platform

        self._library: Any = None  # frees the cache of the old one first
        self._library = gigatoken.Tokenizer.from_json(self._json)
        self._resident_bytes = psutil.Process().memory_info().rss

    def encode(self, texts: list[bytes]) -> Encoded:
        """Return the ids of texts one after the other, and the number of ids of each.

        Raises EncodersDiffer if a text is lost.
        """
        if psutil.Process().memory_info().rss > self._resident_bytes + CACHE_BYTES:
            self._open()
        if has_newer_characters(b"".join(texts)):  # hardly ever
            parts = [
                by_tokenizers(self.tokenizer, list(run)) if is_newer else self.encode(list(run))
                for is_newer, run in groupby(texts, has_newer_characters)
            ]
            ids, lengths = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            return ids, lengths
        self._n_encoded += len(texts)
        if self._n_encoded < SHORT_RUN:
            encoded = [self._library.encode(text) for text in texts]
            return np.concatenate(encoded), np.fromiter(map(len, encoded), np.int64)
        lists = self._library.encode_batch(texts, parallel=False).layout
        if len(lists) != len(texts):
            raise EncodersDiffer(f"gigatoken made {len(lists)} texts of {len(texts)}")
        return lists.content.data, np.diff(lists.offsets.data)

    def compare_sample(
        self, texts: list[bytes], ids: NDArray[np.uint32], lengths: NDArray[np.int64]
    ) -> None:
        """Encode some of these texts, or the beginning of one, with `tokenizers` too.

        Raises EncodersDiffer if gigatoken gave other ids.
        """
        sizes = np.fromiter(map(len, texts), np.int64)
        limit, first = max(256, int(sizes.sum()) // SAMPLED), int(sizes.sum()) % len(texts)
        stop = first + int(np.searchsorted(sizes[first:].cumsum(), limit, side="right"))
        sample = texts[first:stop]
        found = ids[lengths[:first].sum() : lengths[:stop].sum()]
        if not sample:
            sample = [texts[first][:limit].decode("utf-8", "ignore").encode()]
            found, _ = self.encode(sample)
        if not np.array_equal(found, by_tokenizers(self.tokenizer, sample)[0]):
            raise EncodersDiffer(f"gigatoken gives other ids for {sample[0].decode()[:50]!r}")


def by_tokenizers(tokenizer: Tokenizer, texts: list[bytes]) -> Encoded:
    """Return the ids that `tokenizers` gives: they are right by definition."""
    encoded = tokenizer.encode_batch([text.decode() for text in texts])
    return np.fromiter(chain(*encoded), np.uint32), np.fromiter(map(len, encoded), np.int64)


def has_newer_characters(text: bytes) -> bool:
    """Return whether UTF-8 holds one of NEWER_CHARACTERS, for most texts at gigabytes a second."""
    data = np.frombuffer(text, np.uint8)
    for lead, followers in NEWER_BEGINNINGS.items():
        if lead in text and np.isin(data[np.flatnonzero(data == lead) + 1], followers).any():
            return bool(NEWER_CHARACTERS.search(text.decode()))
    return False


def learn(joined: bytes, vocab_size: int) -> tokenizers.Tokenizer | None:
    """Learn what `tokenizers` learns from documents joined by NUL, without an end token.

    Returns None if gigatoken is missing or not faster, or if pairs run out before there are
    `vocab_size` tokens. No document may hold one of NEWER_CHARACTERS.
    """
    if len(joined) < LARGE_BYTES or vocab_size > LARGE_VOCAB_SIZE:
        return None
    try:
        import gigatoken  # not on every platform
    except ImportError:
        return None
    with _streams_closed():
        _, pairs = gigatoken.train_bpe(joined, vocab_size, [], "huggingface", b"\0")
    merges = [(spelled(left), spelled(right)) for left, right in pairs]
    vocabulary = {character: i for i, character in enumerate(sorted(byte_characters()))}
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    backend = byte_level_backend(models.BPE(vocab=vocabulary, merges=merges), use_regex=True)
    encode = gigatoken.Tokenizer.from_json(backend.to_str()).encode
    # when pairs run out it merges some that no longer occur: then no text has the last id
    if not any(vocab_size - 1 in encode(document) for document in split_at_nul(joined)):
        return None
    return backend


def split_at_nul(joined: bytes) -> Iterator[bytes]:
    """Yield the documents between NULs one at a time, without a second copy of all."""
    return (match[0] for match in re.finditer(rb"[^\0]+", joined))


@contextmanager
def _streams_closed() -> Iterator[None]:
    """Discard all output to the descriptors of stdout and stderr."""
    with ExitStack() as stack, open(os.devnull, "wb") as nowhere:
        for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            copy = os.dup(descriptor)
            stack.callback(os.close, copy)
            stack.callback(os.dup2, copy, descriptor)
            os.dup2(nowhere.fileno(), descriptor)
        yield
