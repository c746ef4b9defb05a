"""Text to token ids and back, as one tokenizer.json that Hugging Face opens.

Every tokenizer here is byte-level: each id stands for known bytes, so no text is unknown or lost,
and bits per byte are exact.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers

from lm.base.errors import InputError
from lm.base.files import atomic_write, read_json, to_json
from lm.base.sections import AT_LEAST_ONE, NOT_EMPTY, Count

END_TOKEN = "<|endoftext|>"  # noqa: S105 - a separator, not a password
MIN_BPE_SIZE = 257  # 256 bytes and the end token
MAX_VOCAB_SIZE = 1 << 20  # the trainer reserves memory for all ids at once, and may abort silently
MAX_FILE_BYTES = 1 << 26  # of a tokenizer.json: takes 2 GB to open; Gemma's, a large one, has 33 MB
LONG_RUN = 1024  # characters without a word break: learning takes time by the square of such a word
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class TokenizerConfig:
    """The section `tokenizer`."""

    kind: Annotated[
        Literal["bpe", "bytes", "file", "tiktoken"],
        "bpe: learnt from the text; bytes: one id a byte; file: a `tokenizer.json` of yours; "
        "tiktoken: one of its encodings",
    ]
    vocab_size: Annotated[
        Count, f"bpe: {MIN_BPE_SIZE} to {MAX_VOCAB_SIZE:,}, the end token included"
    ]
    sample_bytes: Annotated[
        int,
        AT_LEAST_ONE,
        "bpe: learnt from at most this much of the training text, sampled by document; a word of "
        f"more than {LONG_RUN:,} characters counts as several",
    ]
    source: Annotated[
        str | None, "file: its name in `data/tokenizers/`; tiktoken: `gpt2`, `o200k_base`, ..."
    ]
    end_token: Annotated[str, NOT_EMPTY, "the token that ends each document"]

    def __post_init__(self) -> None:
        if self.kind == "bpe" and self.vocab_size < MIN_BPE_SIZE:
            raise InputError(
                f"tokenizer.vocab_size = {self.vocab_size}: must be >= {MIN_BPE_SIZE} (256 bytes "
                "and the end token)"
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
        """Raise InputError if it is not byte-level, alters text, or cannot end a document."""
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self._ids = Counter(vocabulary.values())
        if twice := [i for i, count in self._ids.items() if count > 1]:
            raise InputError(f"id {twice[0]} stands for several tokens; give each an id of its own")
        if max(self._ids, default=0) > 2 * len(self._ids):  # ids index tables, the embedding too
            raise InputError(
                f"id {max(self._ids)} is too large for {len(self._ids)} tokens; number them from 0"
            )
        self.left_out = _drop_normalizer(backend)
        if backend.decoder is None or b"ByteLevel" not in backend.decoder.__getstate__():
            raise InputError("not byte-level (its decoder is not ByteLevel); choose one that is")
        if dropout := getattr(backend.model, "dropout", None):
            raise InputError(f"drops merges at random (dropout {dropout}); set dropout to null")
        special = {t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special}
        if end_token not in special:
            raise InputError(
                f"no special token {end_token!r}; set tokenizer.end_token to one of these: "
                f"{', '.join(list(special)[:20])[:400] or 'none'}"
            )
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.end_token = end_token
        self.end_id: int = special[end_token]
        if self.end_id in self.encode(end_token):
            raise InputError(
                f"tokenizer.end_token = {end_token}: plain text gives this token; choose another"
            )

    @cached_property
    def vocab_size(self) -> int:
        """Return the largest id plus 1: the size of a table that ids index."""
        return max(self._ids) + 1

    @property
    def n_unused(self) -> int:
        """Return how many ids below the largest have no token; cl100k_base has some."""
        return self.vocab_size - len(self._ids)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Return the ids of a text. The text of a special token is plain text unless allowed."""
        return self.encode_batch([text], allow_special)[0]

    def encode_batch(self, texts: Sequence[str], allow_special: bool = False) -> list[list[int]]:
        """Return the ids of texts, on all cores. Raises InputError if the library cannot."""
        self.backend.encode_special_tokens = not allow_special
        try:
            encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        except BaseException as error:
            if not _raised_by_library(error):
                raise
            raise InputError(f"the tokenizer cannot encode a text: {error}") from None
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids, special tokens included; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the exact bytes of some ids. A special token gives the bytes of its name."""
        return b"".join(self._bytes_of_id[i] for i in ids)

    @cached_property
    def _bytes_of_id(self) -> dict[int, bytes]:
        special = self.backend.get_added_tokens_decoder()
        bytes_of_character = {c: bytes([b]) for b, c in enumerate(byte_characters())}
        no_token = dict.fromkeys(range(self.vocab_size), b"")  # transformers skips these, too
        return no_token | {
            i: token.encode()
            if i in special
            else b"".join(bytes_of_character.get(c, c.encode()) for c in token)
            for token, i in self.backend.get_vocab(with_added_tokens=True).items()
        }

    @cached_property
    def byte_lengths(self) -> NDArray[np.int64]:
        """Return the bytes of text behind each id, (vocab_size,); 0 for special tokens."""
        lengths = np.array([len(self._bytes_of_id[i]) for i in range(self.vocab_size)])
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
    """Remove a normalizer that does nothing or NFC; return the names of its parts.

    Without it, text in NFC has the same ids, and other text keeps its bytes. Raises InputError for
    any other normalizer, since the model was made for normalized text.
    """
    if backend.normalizer is None:
        return []
    normalizer = json.loads(backend.normalizer.__getstate__())
    kinds = [part["type"] for part in normalizer.get("normalizers", [normalizer])]
    for kind in kinds:
        if kind != "NFC":
            raise InputError(f"its normalizer {kind} alters text; choose a tokenizer without it")
    backend.normalizer = None
    return kinds


def load_tokenizer(folder: Path) -> Tokenizer:
    """Open the tokenizer saved in a folder. Raises InputError if it is missing or damaged."""
    settings = read_json(folder / "tokenizer_config.json")
    end_token = settings.get("eos_token") if isinstance(settings, dict) else None
    if not isinstance(end_token, str):
        raise InputError(f"{folder / 'tokenizer_config.json'}: eos_token is missing or not text")
    return open_tokenizer_json(folder / "tokenizer.json", end_token)


def open_tokenizer_json(file: Path, end_token: str) -> Tokenizer:
    """Open any byte-level tokenizer.json. Raises InputError if it is missing or damaged."""
    if not file.is_file():
        raise InputError(f"{file}: {'not a file' if file.exists() else 'no such file'}")
    if file.stat().st_size > MAX_FILE_BYTES:
        raise InputError(f"{file}: longer than {MAX_FILE_BYTES >> 20} MiB; no tokenizer needs that")
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
    """Return whether `tokenizers` raised this error; it raises these two classes only."""
    return type(error) is Exception or type(error).__name__ == "PanicException"


def byte_tokenizer(end_token: str = END_TOKEN) -> Tokenizer:
    """Return a tokenizer of bytes. Id 255 ends a document: UTF-8 has no byte 0xff."""
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    del vocabulary[byte_characters()[255]]
    vocabulary[end_token] = 255
    backend = byte_level_backend(models.BPE(vocab=vocabulary, merges=[]), use_regex=False)
    backend.add_special_tokens([end_token])
    return Tokenizer(backend, end_token)


def byte_level_backend(model: models.BPE, use_regex: bool) -> tokenizers.Tokenizer:
    """Return a byte-level tokenizer of a model; `use_regex` cuts text by GPT-2's pattern."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    return backend


def spelled(data: bytes) -> str:
    """Return the characters that spell some bytes in a byte-level vocabulary."""
    return "".join(map(byte_characters().__getitem__, data))


@cache
def byte_characters() -> list[str]:
    """Return the character that spells each byte in a byte-level vocabulary (GPT-2's encoder.py).

    Printable Latin-1 characters spell themselves; the other bytes take U+0100 and on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
