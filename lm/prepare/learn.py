"""Where tokenizers come from: learnt from text, or taken over from tiktoken."""

import json
import os
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise, zip_longest
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
from numpy.typing import NDArray
from tokenizers import models, pre_tokenizers, trainers

from lm.base.errors import EnvironmentFault, InputError, one_line_errors
from lm.data.tokenizer import (
    END_TOKEN,
    GPT2_PATTERN,
    Tokenizer,
    _byte_characters,
    _byte_level_backend,
    open_tokenizer_json,
)
from lm.prepare.encoder import has_newer_characters

SAMPLE_CHARACTERS = 5000  # of a text on which a tokenizer from elsewhere is tried
TRIAL_SECONDS = 60  # for a foreign tokenizer to encode a few megabytes
LONG_RUN = 1024  # characters without a word break: learning takes time by the square of such a word
LARGE_BYTES = 32 << 20  # of text: below, gigatoken's training is slower, it is quadratic in ties
LARGE_VOCAB_SIZE = (1 << 15) + 257  # above, ties are too many again
# GPT-2's pattern as tiktoken spells it for speed, and as all others know it by sight.
_TIKTOKEN_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def train_bpe(texts: Iterable[str], vocab_size: int, end_token: str = END_TOKEN) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016) with GPT-2's pre-tokenizer, learnt from texts.

    Ids: the 256 bytes in GPT-2's order, then the merges as learnt, the end token last. Of equally
    frequent pairs the one with the smallest ids is merged first, whatever the thread count.
    """
    backend = _byte_level_backend(models.BPE(), use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([end_token])
    return Tokenizer(backend, end_token)


def train_bpe_large(documents: bytes, vocab_size: int, end_token: str = END_TOKEN) -> Tokenizer:
    """The same from documents joined by NUL, which none holds: of 32 MiB and more in seconds.

    gigatoken learns there what `tokenizers` learns, which does it where the former is missing or
    runs out of pairs. Both leave out documents with characters that only gigatoken knows, and take
    a word of more than LONG_RUN characters for several.
    """
    tokenizer, documents = None, _with_long_runs_cut(documents)
    if len(documents) >= LARGE_BYTES:
        if any(map(has_newer_characters, _split(documents))):
            known = (text for text in _split(documents) if not has_newer_characters(text))
            documents = b"\0".join(known)
        if vocab_size <= LARGE_VOCAB_SIZE:
            tokenizer = _train_by_gigatoken(documents, vocab_size, end_token)
    return tokenizer or train_bpe(map(bytes.decode, _split(documents)), vocab_size, end_token)


def _train_by_gigatoken(documents: bytes, vocab_size: int, end_token: str) -> Tokenizer | None:
    """None if there is no gigatoken, or not so many pairs as to make a vocabulary of this size."""
    try:
        import gigatoken  # not on every platform
    except ImportError:
        return None
    with _streams_closed():
        _, pairs = gigatoken.train_bpe(documents, vocab_size - 1, [], "huggingface", b"\0")
    characters = _byte_characters()
    merges = [
        ("".join(characters[b] for b in left), "".join(characters[b] for b in right))
        for left, right in pairs
    ]
    vocabulary = {character: i for i, character in enumerate(sorted(characters))}
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    backend = _byte_level_backend(models.BPE(vocab=vocabulary, merges=merges), use_regex=True)
    encode = gigatoken.Tokenizer.from_json(backend.to_str()).encode
    last = vocab_size - 2  # when pairs run out it goes on with some that no longer occur
    if not any(last in encode(document) for document in _split(documents)):
        return None
    backend.add_special_tokens([end_token])
    return Tokenizer(backend, end_token)


def _with_long_runs_cut(documents: bytes) -> bytes:
    """Documents joined by NUL with a cut after each LONG_RUN characters of a word.

    No word of a language is as long: DNA, tables of digits, rows of marks or of white space are.
    """
    half = LONG_RUN // 2
    blocks = np.frombuffer(documents, np.uint8)[: len(documents) // half * half].reshape(-1, half)
    is_break, is_space = _byte_kinds()
    step = (1 << 22) // half
    in_one_word = np.concatenate(
        [np.zeros(0, np.bool_)]
        + [
            ~is_break[part].any(1) | is_space[part].all(1)
            for part in (blocks[i : i + step] for i in range(0, len(blocks), step))
        ]
    )
    if not in_one_word.any():  # most text
        return documents
    parts, start = [], 0
    for document in _split(documents):
        end = start + len(document)
        has_one = in_one_word[start // half : end // half + 1].any()
        parts.append(_cut_long_runs(document) if has_one else document)
        start = end + 1
    return b"\0".join(parts)


def _cut_long_runs(document: bytes) -> bytes:
    text = document.decode()
    kinds = _character_kinds()[np.frombuffer(text.encode("utf-32-le"), np.uint32)]
    ends = np.append(np.flatnonzero(kinds[1:] != kinds[:-1]) + 1, len(text))
    sizes = np.diff(ends, prepend=0)
    is_long = sizes > LONG_RUN
    cuts = [
        cut
        for end, size in zip(ends[is_long].tolist(), sizes[is_long].tolist(), strict=True)
        for cut in range(end - size + LONG_RUN, end, LONG_RUN)
    ]
    return "\0".join(text[a:b] for a, b in pairwise([0, *cuts, len(text)])).encode()


@cache
def _byte_kinds() -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether a byte surely ends a word, and whether it may be a part of white space, (256,)."""
    spaces = "".join(filter(str.isspace, map(chr, range(0x3001))))
    is_break, is_space = np.zeros((2, 256), np.bool_)
    is_break[[0, *b" \t\n\v\f\r"]] = True
    is_space[list(spaces.encode())] = True
    return is_break, is_space


@cache
def _character_kinds() -> NDArray[np.uint8]:
    """What GPT-2's pattern takes a character for: 1 a letter, 2 a number, 3 white space, 0 else."""
    kinds = {"L": 1, "N": 2, "Z": 3}
    categories = (unicodedata.category(chr(code))[0] for code in range(0x110000))
    table = np.fromiter((kinds.get(category, 0) for category in categories), np.uint8, 0x110000)
    table[[*b"\t\n\v\f\r", 0x85]] = 3
    return table


def _split(documents: bytes) -> Iterator[bytes]:
    """The documents between NULs, one at a time."""
    start = 0
    while start <= len(documents):
        end = documents.find(b"\0", start)
        end = len(documents) if end < 0 else end
        yield documents[start:end]
        start = end + 1


@contextmanager
def _streams_closed() -> Iterator[None]:
    """What a library prints past Python, to stdout and stderr, goes nowhere."""
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


def from_tiktoken(name: str, samples: Iterable[str], end_token: str = END_TOKEN) -> Tokenizer:
    """A named tiktoken encoding as a tokenizer.json, its ids compared on some texts.

    tiktoken keeps the rank of each token; the merge that makes it is found by applying the
    lower ranks to its bytes. Raises InputError for an unknown name, EnvironmentFault when
    tiktoken cannot fetch its data.
    """
    known = {*tiktoken.list_encoding_names(), *tiktoken.registry.ENCODINGS}
    if name not in known:
        raise InputError(f"tokenizer.source = {name}: tiktoken knows {', '.join(sorted(known))}")
    try:
        encoding = tiktoken.get_encoding(name)
    except (
        OSError,
        ValueError,
    ) as error:  # requests' errors are OSErrors, a wrong hash a ValueError
        raise EnvironmentFault(
            f"tokenizer.source = {name}: tiktoken could not fetch its data "
            f"({type(error).__name__}); go online once or set TIKTOKEN_CACHE_DIR"
        ) from None
    characters, ranks = _byte_characters(), encoding._mergeable_ranks

    def spell(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    vocabulary = {spell(token): rank for token, rank in ranks.items()} | encoding._special_tokens
    merges = [
        (spell(left), spell(right))
        for token in sorted(ranks, key=ranks.__getitem__)
        if len(token) > 1
        for left, right in [_last_merge(token, ranks)]
    ]
    backend = _byte_level_backend(models.BPE(vocab=vocabulary, merges=merges), use_regex=False)
    pattern = GPT2_PATTERN if encoding._pat_str == _TIKTOKEN_GPT2 else encoding._pat_str
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
            backend.pre_tokenizer,
        ]
    )
    backend.add_special_tokens(list(encoding._special_tokens))
    tokenizer = Tokenizer(backend, end_token)
    for sample in (sample[:SAMPLE_CHARACTERS] for sample in samples):
        if tokenizer.encode(sample) != encoding.encode_ordinary(sample):
            raise InputError(
                f"tokenizer.source = {name}: ids differ from tiktoken's; cannot be used"
            )
    return tokenizer


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The pair whose merge makes `token`: byte-pair encode it with the lower ranks only."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def foreign_tokenizer(file: Path, samples: Iterable[str], end_token: str = END_TOKEN) -> Tokenizer:
    """A tokenizer.json by others, tried on hard texts and on the beginnings of some of the user's.

    Raises InputError if it is damaged, alters text or takes too long. The trial is a process of its
    own, because a pattern may backtrack for years and the library, when it gives up, panics aloud.
    """
    texts = json.dumps([sample[:SAMPLE_CHARACTERS] for sample in samples])
    trial = subprocess.run(
        [sys.executable, "-m", "lm.prepare.learn", file, end_token, str(TRIAL_SECONDS)],
        input=texts.encode(),
        stderr=subprocess.PIPE,
    )
    if trial.returncode == -signal.SIGALRM:
        raise InputError(
            f"{file}: not done with a few megabytes of text after {TRIAL_SECONDS} s; its pattern "
            "backtracks too much"
        )
    if trial.returncode != 0:
        *_, last = trial.stderr.decode("utf-8", "replace").strip().split("\n")
        if not last.startswith("error: "):
            raise InputError(f"{file}: ended its trial by a crash {last}".rstrip())
        raise InputError(last.removeprefix("error: "))
    return open_tokenizer_json(file, end_token)


def _trial(file: str, end_token: str, seconds: str) -> None:
    """Encode every byte of UTF-8, long runs, added tokens amid spaces, and the texts on stdin."""
    signal.alarm(int(seconds))  # ends the process, wherever it is and whoever still waits for it
    tokenizer = open_tokenizer_json(Path(file), end_token)
    added = tokenizer.backend.get_added_tokens_decoder().values()
    texts = [
        "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000, 0x1000)])),
        *(chr(code) * 10_000 + "!" for code in range(128)),
        "".join(f"a  {token.content}  b{token.content}c\n{token.content}\n" for token in added),
        *json.load(sys.stdin),
    ]
    try:
        encoded = tokenizer.encode_batch(texts)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    for text, ids in zip(texts, encoded, strict=True):
        given, kept = text.encode(), tokenizer.decode_bytes(ids)
        if given != kept:
            different = (a != b for a, b in zip_longest(given, kept))
            at = max(0, list(different).index(True) - 5)
            raise InputError(
                f"{file}: alters text: {given[at : at + 20]!r} came back as {kept[at : at + 20]!r}"
            )
        if tokenizer.backend.decode(ids, skip_special_tokens=False) != text:  # as others will
            raise InputError(f"{file}: its decoder alters text; set decoder to type ByteLevel")


if __name__ == "__main__":
    with one_line_errors():
        _trial(*sys.argv[1:])
