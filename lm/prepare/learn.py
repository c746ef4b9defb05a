"""Learn byte-level BPE from text, with GPT-2's pre-tokenizer."""

import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from tokenizers import models, pre_tokenizers, trainers

from lm.data.tokenizer import END_TOKEN, LONG_RUN, Tokenizer, byte_level_backend
from lm.prepare import gigatoken_guard
from lm.prepare.gigatoken_guard import split_at_nul


def train_bpe(texts: Iterable[str], vocab_size: int, end_token: str = END_TOKEN) -> Tokenizer:
    """Learn byte-level BPE (Sennrich et al. 2016) with GPT-2's pre-tokenizer from texts.

    Ids: the 256 bytes in GPT-2's order, the merges as learnt, the end token. Of equally frequent
    pairs the one with the smallest ids is merged first, whatever the number of threads.
    """
    backend = byte_level_backend(models.BPE(), use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([end_token])
    return Tokenizer(backend, end_token)


def train_bpe_large(joined: bytes, vocab_size: int, end_token: str = END_TOKEN) -> Tokenizer:
    """Learn the same from documents joined by NUL, a byte that none holds: 32 MiB take seconds.

    A word of more than LONG_RUN characters counts as several. In a large text, documents with
    characters that only gigatoken knows are left out, so that both libraries learn the same.
    """
    joined = _with_long_runs_cut(joined)
    is_newer = gigatoken_guard.has_newer_characters
    if len(joined) >= gigatoken_guard.LARGE_BYTES and any(map(is_newer, split_at_nul(joined))):
        joined = b"\0".join(text for text in split_at_nul(joined) if not is_newer(text))
    backend = gigatoken_guard.learn(joined, vocab_size - 1)
    if backend is None:
        return train_bpe(map(bytes.decode, split_at_nul(joined)), vocab_size, end_token)
    backend.add_special_tokens([end_token])
    return Tokenizer(backend, end_token)


def _with_long_runs_cut(documents: bytes) -> bytes:
    """Cut words after each LONG_RUN characters, in documents joined by NUL; drop empty documents.

    DNA, tables of digits, rows of marks or of white space hold such words; languages do not.
    """
    half = LONG_RUN // 2
    blocks = np.frombuffer(documents, np.uint8)[: len(documents) // half * half].reshape(-1, half)
    is_break, is_space = _byte_kinds()
    step = (1 << 22) // half
    in_one_word = np.zeros(len(blocks), np.bool_)
    for i in range(0, len(blocks), step):
        part = blocks[i : i + step]
        in_one_word[i : i + step] = ~is_break[part].any(1) | is_space[part].all(1)
    if not in_one_word.any():  # most text
        return documents
    parts = []
    for match in re.finditer(rb"[^\0]+", documents):
        has_one = in_one_word[match.start() // half : match.end() // half + 1].any()
        parts.append(_cut_long_runs(match[0]) if has_one else match[0])
    return b"\0".join(parts)


def _cut_long_runs(document: bytes) -> bytes:
    text = document.decode()
    kinds = _character_kinds()[np.frombuffer(text.encode("utf-32-le"), np.uint32)]
    edges = np.concatenate([[0], np.flatnonzero(np.diff(kinds)) + 1, [len(text)]])
    long = np.flatnonzero(np.diff(edges) > LONG_RUN)  # few
    runs = zip(edges[long].tolist(), edges[long + 1].tolist(), strict=True)
    cuts = [cut for a, b in runs for cut in range(a + LONG_RUN, b, LONG_RUN)]
    return "\0".join(text[a:b] for a, b in pairwise([0, *cuts, len(text)])).encode()


@cache
def _byte_kinds() -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return masks of the bytes that end a word, and of those in white space, both (256,)."""
    spaces = "".join(filter(str.isspace, map(chr, range(0x3001))))
    is_break, is_space = np.zeros((2, 256), np.bool_)
    is_break[[0, *b" \t\n\v\f\r"]] = True
    is_space[list(spaces.encode())] = True
    return is_break, is_space


@cache
def _character_kinds() -> NDArray[np.uint8]:
    """Return GPT-2's class of each character: 1 letter, 2 number, 3 white space, 0 other."""
    kinds = {"L": 1, "N": 2, "Z": 3}
    categories = (unicodedata.category(chr(code))[0] for code in range(0x110000))
    table = np.fromiter((kinds.get(category, 0) for category in categories), np.uint8, 0x110000)
    table[[*b"\t\n\v\f\r", 0x85]] = 3
    return table
