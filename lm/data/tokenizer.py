"""Text to token ids and back, as one tokenizer.json that Hugging Face opens.

Every tokenizer here is byte-level: each id stands for known bytes, no text is unknown and
none is lost, which is what makes bits per byte exact.
"""

import json
import os
import re
import signal
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tiktoken
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from lm.base.config import AT_LEAST_ONE, NOT_EMPTY, Count
from lm.base.errors import EnvironmentFault, InputError, one_line_errors
from lm.base.files import atomic_write, read_json, to_json

END_TOKEN = "<|endoftext|>"  # noqa: S105 - a separator, not a password
MAX_VOCAB_SIZE = 1 << 20  # the trainer reserves memory for all at once, and aborts without a word
MAX_JSON_BYTES = 1 << 26  # of a tokenizer.json: takes 2 GB to open; Gemma's, a large one, has 33 MB
SAMPLE_CHARACTERS = 5000  # of a text on which a tokenizer from elsewhere is tried
TRIAL_SECONDS = 60  # for a foreign tokenizer to encode a few megabytes
LONG_RUN = 1024  # characters without a word break: learning takes time by the square of such a word
LARGE_BYTES = 32 << 20  # of text: below, gigatoken's training is slower, it is quadratic in ties
LARGE_VOCAB_SIZE = (1 << 15) + 257  # above, ties are too many again
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
# GPT-2's pattern as tiktoken spells it for speed, and as all others know it by sight.
_TIKTOKEN_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class TokenizerConfig:
    """The section `tokenizer`."""

    kind: Literal["bpe", "bytes", "file", "tiktoken"]
    vocab_size: Count  # of "bpe", the end token included
    sample_bytes: Annotated[int, AT_LEAST_ONE]  # of training text that "bpe" learns from, at most
    source: str | None  # "file": a name in data/tokenizers/; "tiktoken": an encoding's name
    end_token: Annotated[str, NOT_EMPTY]  # stands between documents

    def __post_init__(self) -> None:
        if self.kind == "bpe" and self.vocab_size < 257:
            raise InputError(
                f"tokenizer.vocab_size = {self.vocab_size}: must be >= 257 (256 bytes, an end)"
            )
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise InputError(
                f"tokenizer.vocab_size = {self.vocab_size}: must be <= {MAX_VOCAB_SIZE}"
            )
        if self.kind in ("file", "tiktoken") and self.source is None:
            raise InputError(f"tokenizer.source = null: tokenizer.kind = {self.kind} needs a name")
        if self.kind == "file" and (
            Path(str(self.source)).name != self.source or self.source in ("", "..")
        ):
            raise InputError(
                f"tokenizer.source = {self.source}: must be a file's name in data/tokenizers/, "
                "which DVC watches; copy the file there"
            )


class Tokenizer:
    """A byte-level tokenizer with one token that ends a document."""

    def __init__(self, backend: tokenizers.Tokenizer, end_token: str = END_TOKEN):
        """Raises InputError if it is not byte-level, alters text, or cannot end a document."""
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self._ids = Counter(vocabulary.values())
        if twice := [i for i, count in self._ids.items() if count > 1]:
            raise InputError(f"id {twice[0]} stands for several tokens")
        if max(self._ids, default=0) > 2 * len(self._ids):  # ids index tables, the embedding too
            raise InputError(f"id {max(self._ids)} is too large for {len(self._ids)} tokens")
        self.left_out = _drop_normalizer(backend)
        if backend.decoder is None or b"ByteLevel" not in backend.decoder.__getstate__():
            raise InputError("not byte-level; bits per byte would not be exact")
        if dropout := getattr(backend.model, "dropout", None):
            raise InputError(f"drops merges at random (dropout {dropout}); set dropout to null")
        special = {t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special}
        if end_token not in special:
            raise InputError(
                f"no special token {end_token!r}; set tokenizer.end_token to one that it has: "
                f"{', '.join(list(special)[:20])[:400] or 'none'}"
            )
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.end_token = end_token
        self.end_id: int = special[end_token]
        if self.end_id in self.encode(end_token):
            raise InputError(f"tokenizer.end_token = {end_token}: plain text gives this token too")

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, so that ids index a table of this size."""
        return max(self._ids) + 1

    @property
    def n_unused(self) -> int:
        """How many ids below the largest no token has: gaps, as in tiktoken's cl100k_base."""
        return self.vocab_size - len(self._ids)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Token ids of a text. The text of a special token is plain text unless allowed."""
        return self.encode_batch([text], allow_special)[0]

    def encode_batch(self, texts: Sequence[str], allow_special: bool = False) -> list[list[int]]:
        """Token ids of several texts, on all cores. Raises InputError if the library gives up."""
        self.backend.encode_special_tokens = not allow_special
        try:
            encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        except BaseException as error:
            if not _raised_by_library(error):
                raise
            raise InputError(f"the tokenizer cannot encode a text: {error}") from None
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens included; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The exact bytes of some ids. A special token gives the bytes of its name."""
        return b"".join(self._bytes_of_id[i] for i in ids)

    @cached_property
    def _bytes_of_id(self) -> dict[int, bytes]:
        special = self.backend.get_added_tokens_decoder()
        bytes_of_character = {c: bytes([b]) for b, c in enumerate(_byte_characters())}
        no_token = dict.fromkeys(range(self.vocab_size), b"")  # transformers passes over these, too
        return no_token | {
            i: token.encode()
            if i in special
            else b"".join(bytes_of_character.get(c, c.encode()) for c in token)
            for token, i in self.backend.get_vocab(with_added_tokens=True).items()
        }

    @cached_property
    def byte_lengths(self) -> NDArray[np.int64]:
        """Bytes of text behind each id, (vocab_size,). Special tokens stand for no text: 0."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for i, data in self._bytes_of_id.items():
            lengths[i] = len(data)
        lengths[[i for i, t in self.backend.get_added_tokens_decoder().items() if t.special]] = 0
        lengths[self.end_id] = 0
        return lengths

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and the tokenizer_config.json that Hugging Face reads beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / "tokenizer.json", self.backend.to_str(pretty=True).encode() + b"\n")
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.end_token}
        atomic_write(folder / "tokenizer_config.json", to_json(settings))


def _drop_normalizer(backend: tokenizers.Tokenizer) -> list[str]:
    """Take the normalizer away if it is NFC or does nothing; returns what it did.

    Text in NFC has the same ids without it, and other text keeps its bytes. Raises InputError for
    another one: the model knows its output alone.
    """
    if backend.normalizer is None:
        return []
    normalizer = json.loads(backend.normalizer.__getstate__())
    kinds = [part["type"] for part in normalizer.get("normalizers", [normalizer])]
    for kind in kinds:
        if kind != "NFC":
            raise InputError(f"its normalizer {kind} alters text; not supported")
    backend.normalizer = None
    return kinds


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer saved in a folder. Raises InputError if it is missing or damaged."""
    settings = read_json(folder / "tokenizer_config.json")
    end_token = settings.get("eos_token") if isinstance(settings, dict) else None
    if not isinstance(end_token, str):
        raise InputError(f"{folder / 'tokenizer_config.json'}: names no text as eos_token")
    return open_tokenizer_json(folder / "tokenizer.json", end_token)


def open_tokenizer_json(file: Path, end_token: str) -> Tokenizer:
    """Any byte-level tokenizer.json. Raises InputError if it is missing, damaged or otherwise."""
    if not file.is_file():
        raise InputError(f"{file}: {'not a file' if file.exists() else 'no such file'}")
    if file.stat().st_size > MAX_JSON_BYTES:
        raise InputError(f"{file}: longer than {MAX_JSON_BYTES >> 20} MiB; no tokenizer needs that")
    try:
        backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except BaseException as error:
        if not (isinstance(error, UnicodeDecodeError) or _raised_by_library(error)):
            raise
        raise InputError(f"{file}: not a tokenizer.json ({error})") from None
    try:
        return Tokenizer(backend, end_token)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def _raised_by_library(error: BaseException) -> bool:
    """Whether `tokenizers` gave up: it has no narrower classes than these two."""
    return type(error) is Exception or type(error).__name__ == "PanicException"


def foreign_tokenizer(file: Path, samples: Iterable[str], end_token: str = END_TOKEN) -> Tokenizer:
    """A tokenizer.json by others, tried on hard texts and on the beginnings of some of the user's.

    Raises InputError if it is damaged, alters text or takes too long. The trial is a process of its
    own, because a pattern may backtrack for years and the library, when it gives up, panics aloud.
    """
    texts = json.dumps([sample[:SAMPLE_CHARACTERS] for sample in samples])
    trial = subprocess.run(
        [sys.executable, "-m", "lm.data.tokenizer", file, end_token, str(TRIAL_SECONDS)],
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


def byte_tokenizer(end_token: str = END_TOKEN) -> Tokenizer:
    """Each byte is its own id, 256 in all. Id 255 ends a document: UTF-8 has no byte 0xff."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    del vocabulary[_byte_characters()[255]]
    vocabulary[end_token] = 255
    backend = _byte_level_backend(models.BPE(vocab=vocabulary, merges=[]), use_regex=False)
    backend.add_special_tokens([end_token])
    return Tokenizer(backend, end_token)


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


def _byte_level_backend(model: models.BPE, use_regex: bool) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_characters() -> list[str]:
    """The character that spells each byte in a byte-level vocabulary (GPT-2's encoder.py).

    Printable Latin-1 characters spell themselves; the other bytes take U+0100 and on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


if __name__ == "__main__":
    with one_line_errors():
        _trial(*sys.argv[1:])
