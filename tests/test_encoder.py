"""The encoder against tokenizers and tiktoken, and what guards it."""

import json
import pickle
import random
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tiktoken_ext.openai_public import r50k_pat_str

import lm.prepare.encoder
import lm.prepare.gigatoken_guard
from lm.base.errors import InputError
from lm.data.tokenizer import (
    END_TOKEN,
    Tokenizer,
    byte_characters,
    byte_level_backend,
    byte_tokenizer,
)
from lm.prepare.encoder import DocumentRefused, Encoder
from lm.prepare.foreign import from_tiktoken
from lm.prepare.gigatoken_guard import EncodersDiffer, has_newer_characters
from lm.prepare.learn import train_bpe
from tests.project import ROOT

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CODE = (ROOT / "lm" / "data" / "tokenizer.py").read_text()
ENGLISH = (ROOT / "README.md").read_text()
MIXED = [
    CODE,
    ENGLISH,
    "東京は日本の首都です。中文没有空格。한국어 텍스트 " * 20,
    "🙂🙃 👩‍👩‍👧 e\u0301 naïve Ωμέγα мир 12345 ½ ٣٤ " * 20,
    " " * 3000 + "\n" * 3000 + "a" * 3000 + "-" * 3000 + "1" * 3000,
    "don't   panic\r\n\tx\u00a0y  \n\n z<|endoftext|>end <|endoftext|>",
]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(MIXED, 3000)


@pytest.fixture(scope="module")
def encoder(bpe):
    return Encoder(bpe, "gigatoken")


@pytest.fixture(scope="module")
def encoding(bpe):
    """A tiktoken encoding with our merges as its ranks and GPT-2's pattern."""
    vocabulary = json.loads(bpe.backend.to_str())["model"]["vocab"]
    ranks = {bpe.decode_bytes([i]): i for i in vocabulary.values()}
    return tiktoken.Encoding("ours", pat_str=GPT2, mergeable_ranks=ranks, special_tokens={})


def split(ids, lengths):
    """The ids of each document, as lists."""
    edges = [0, *np.cumsum(lengths).tolist()]
    assert edges[-1] == len(ids)
    return [ids[start:end].tolist() for start, end in pairwise(edges)]


PIECES = st.one_of(
    st.text(min_size=1),
    st.sampled_from([*"\0 \n\t'。", "\r\n", "  ", "Ġ", "Tokenizer", " the", END_TOKEN, "'ll", "٣"]),
)
TEXTS = st.lists(st.lists(PIECES, min_size=1).map("".join), max_size=5)


@given(texts=TEXTS)
@example(texts=MIXED)
@example(texts=["x"])
@example(texts=[])
def test_ids_equal_tokenizers_and_tiktoken(encoder, encoding, bpe, texts):
    ids, lengths = encoder.encode([text.encode() for text in texts])
    assert (ids.dtype, lengths.dtype) == (np.uint32, np.int64)
    found = split(ids, lengths)
    assert found == bpe.encode_batch(texts)
    assert found == encoding.encode_ordinary_batch(texts, num_threads=1)


def test_both_libraries_and_both_ways_of_gigatoken_give_the_same(bpe, encoder, monkeypatch):
    documents = [line.encode() for text in MIXED for line in text.splitlines() if line] * 3
    one_by_one = encoder.encode(documents)
    monkeypatch.setattr(lm.prepare.gigatoken_guard, "SHORT_RUN", 0)
    batched = encoder.encode(documents)
    slow = Encoder(bpe, "tokenizers")
    assert slow.why_not == "tokenizers was requested"
    for ids, lengths in (batched, slow.encode(documents)):
        np.testing.assert_array_equal(ids, one_by_one[0])
        np.testing.assert_array_equal(lengths, one_by_one[1])


@pytest.mark.parametrize("library", ["gigatoken", "tokenizers"])
def test_a_long_document_is_encoded_in_pieces_and_nobody_can_tell(bpe, library, monkeypatch):
    text = "".join(MIXED * 3)
    documents = [b"first", text.encode(), "東京".encode(), text[::-1].encode()]
    expected = bpe.encode_batch([document.decode() for document in documents])
    encoder = Encoder(bpe, library)
    for size in (1000, 5003):
        monkeypatch.setattr(lm.prepare.encoder, "GROUP_BYTES", size)
        assert len(encoder._pieces(0, documents[1])) > len(text) // size // 4
        assert split(*encoder.encode(documents)) == expected


def test_a_long_document_is_not_cut_where_the_tokenizer_joins_two_words(monkeypatch):
    """It has learnt from a text without word breaks, so its tokens go over spaces."""
    sentence = "low lower lowest, new newer newest. "
    backend = byte_level_backend(tokenizers.models.BPE(), use_regex=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([sentence * 5], trainer)
    backend.add_special_tokens([END_TOKEN])
    tokenizer = Tokenizer(backend)
    assert any("w l" in tokenizer.decode([i]) for i in range(tokenizer.vocab_size))
    monkeypatch.setattr(lm.prepare.encoder, "GROUP_BYTES", 100)
    for text in (sentence * 20, sentence[5:] * 20):
        ids, _ = Encoder(tokenizer, "tokenizers").encode([text.encode()])
        assert ids.tolist() == tokenizer.encode(text)


def test_where_all_words_are_joined_the_search_for_a_cut_has_an_end():
    ends = list(lm.prepare.encoder._word_ends(b"ab " * (1 << 20), 1 << 20, 1 << 24))
    assert len(ends) == 32 * 100
    assert ends[0] > 1 << 20
    assert not list(lm.prepare.encoder._word_ends(b"x" * (1 << 21), 0, 1 << 24))


def test_a_run_that_cannot_be_cut_has_a_limit(encoder, monkeypatch):
    monkeypatch.setattr(lm.prepare.encoder, "GROUP_BYTES", 1000)
    monkeypatch.setattr(lm.prepare.encoder, "RUN_BYTES", 1 << 20)
    assert encoder.encode([b"x" * 5000])[1].tolist() == [len(encoder.encode([b"x" * 5000])[0])]
    with pytest.raises(DocumentRefused, match="1 MiB without a place where the tokenizer") as e:
        encoder.encode([b"x", b"x" * (1 << 20) + b"x"])
    assert e.value.index == 1


def test_bytes_and_tokenizers_with_other_patterns_keep_their_ids(bpe):
    texts = [text.encode() for text in MIXED]
    for tokenizer in (byte_tokenizer(), other_pattern(bpe, r" ?\w+|\s+|."), no_pattern(bpe)):
        encoder = Encoder(tokenizer)
        assert split(*encoder.encode(texts)) == tokenizer.encode_batch(MIXED)


def other_pattern(bpe, pattern):
    backend = tokenizers.Tokenizer.from_str(bpe.backend.to_str())
    parts = [
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(parts)
    return Tokenizer(backend)


def no_pattern(bpe):
    backend = tokenizers.Tokenizer.from_str(bpe.backend.to_str())
    plain = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = plain
    return Tokenizer(backend)


def test_a_tokenizer_that_gigatoken_does_not_know_or_misreads_is_left_to_tokenizers(bpe):
    refused = Encoder(other_pattern(bpe, r" ?\w+|\s+|."))
    assert "refuses this tokenizer: Unknown pre_tokenizer" in refused.why_not
    misread = Encoder(no_pattern(bpe))
    assert "gigatoken gives other ids for" in misread.why_not
    with pytest.raises(InputError, match="gigatoken gives other ids for"):
        Encoder(no_pattern(bpe), "gigatoken")


def test_the_text_of_any_added_token_is_encoded_as_tokenizers_does(bpe):
    """Special ones are plain text, ordinary added ones are tokens."""
    backend = tokenizers.Tokenizer.from_str(bpe.backend.to_str())
    backend.add_special_tokens(["<|pad|>"])
    backend.add_tokens(["<tool>"])
    tokenizer = Tokenizer(backend)
    texts = [f"a<|pad|> <|pad|>{END_TOKEN}b", "x<tool>y <tool>"]
    ids, lengths = Encoder(tokenizer).encode([text.encode() for text in texts])
    assert split(ids, lengths) == tokenizer.encode_batch(texts)
    specials = {backend.token_to_id(END_TOKEN), backend.token_to_id("<|pad|>")}
    assert not specials & set(ids.tolist())
    assert backend.token_to_id("<tool>") in ids


def test_the_gpt2_encoding_of_tiktoken_is_known_to_gigatoken(encoding, bpe, monkeypatch):
    special = {END_TOKEN: encoding.max_token_value + 1}
    made = tiktoken.Encoding(
        "fast",
        pat_str=r50k_pat_str,
        mergeable_ranks=encoding._mergeable_ranks,
        special_tokens=special,
    )
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "fast", made)
    encoder = Encoder(from_tiktoken("fast", MIXED))
    assert encoder.why_not is None
    texts = [*MIXED, "end  \n ", " \n\n x \n"]
    found = split(*encoder.encode([text.encode() for text in texts]))
    assert found == made.encode_ordinary_batch(texts)


def test_a_document_that_is_altered_is_named_by_its_index(bpe):
    backend = tokenizers.Tokenizer.from_str(bpe.backend.to_str())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    for library in ("gigatoken", "tokenizers"):
        encoder = Encoder(Tokenizer(backend), library)
        with pytest.raises(DocumentRefused, match="3 bytes of text became tokens of 4") as e:
            encoder.encode([b" kept", b" too", b"not", b"neither"])
        assert e.value.index == 2


def test_a_tokenizer_that_drops_bytes_is_noticed():
    vocabulary = json.loads(byte_tokenizer().backend.to_str())["model"]["vocab"]
    del vocabulary["x"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([END_TOKEN])
    encoder = Encoder(Tokenizer(backend), "tokenizers")
    for documents in ([b"abc", b"xx"], [b"abc", b"axc", b"d"], [b"x", b"x"]):
        with pytest.raises(DocumentRefused) as e:
            encoder.encode(documents)
        assert b"x" in documents[e.value.index]


def test_every_call_compares_a_sample_so_that_a_wrong_library_is_found_out(bpe, encoder):
    """gigatoken with another vocabulary stands in for one with a defect."""
    wrong = Encoder(bpe, "gigatoken")
    other = Encoder(train_bpe(MIXED[:1], 2000), "gigatoken")
    wrong._gigatoken._library = other._gigatoken._library
    document = ENGLISH.encode()
    wrong._byte_lengths = train_bpe(MIXED[:1], 2000).byte_lengths.astype(np.int32)
    for documents in ([document], [b"the documents"], document.splitlines()[:5]):
        with pytest.raises(EncodersDiffer, match="gigatoken gives other ids for"):
            wrong.encode([d for d in documents if d])
        encoder.encode([d for d in documents if d])


def test_a_document_that_gets_lost_is_noticed(encoder, monkeypatch):
    """gigatoken drops empty ones from some sources; we pass none, and count."""
    monkeypatch.setattr(lm.prepare.gigatoken_guard, "SHORT_RUN", 0)
    library = encoder._gigatoken._library
    encode = library.encode_batch
    lose = lambda texts, parallel: encode(texts[1:], parallel=parallel)  # noqa: E731
    monkeypatch.setattr(library, "encode_batch", lose)
    with pytest.raises(EncodersDiffer, match="made 2 texts of 3"):
        encoder.encode([b"a", b"b", b"c"])


GROWTH = """
import random, sys
import psutil
import lm.prepare.gigatoken_guard
from lm.prepare.encoder import Encoder
from lm.data.tokenizer import byte_tokenizer
from lm.prepare.learn import train_bpe

lm.prepare.gigatoken_guard.CACHE_BYTES = int(sys.argv[1]) << 20
encoder = Encoder(train_bpe(["low lower lowest"], 300), "gigatoken")
letters = bytes(b"abcdefghijklmnopqrstuvwxyz      "[i % 32] for i in range(256))
before = psutil.Process().memory_info().rss
for i in range(24):
    encoder.encode([random.Random(i).randbytes(1 << 20).translate(letters)])
print((psutil.Process().memory_info().rss - before) >> 20)
"""


def test_memory_stays_bounded_when_every_word_is_new():
    """24 MB of random words, with a limit of 40 MB, and as a control with one of a gigabyte."""
    bounded, unbounded = (
        int(subprocess.check_output([sys.executable, "-c", GROWTH, limit], cwd=ROOT))
        for limit in ("40", "1000")
    )
    assert bounded < 100 < unbounded


BLOCKED = """
import sys
sys.modules["gigatoken"] = None  # import gigatoken raises ImportError
from lm.prepare.encoder import Encoder
from lm.prepare.learn import train_bpe
text = open("README.md").read()
encoder = Encoder(train_bpe([text], 500))
ids, lengths = encoder.encode([text.encode(), b"another"])
print(encoder.why_not, ids.sum(), lengths, sep="|")
"""


def test_without_gigatoken_the_ids_are_the_same():
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], cwd=ROOT, capture_output=True, text=True, check=True
    )
    ids, lengths = Encoder(train_bpe([ENGLISH], 500), "gigatoken").encode(
        [ENGLISH.encode(), b"another"]
    )
    assert done.stdout == f"gigatoken is not installed|{ids.sum()}|{lengths}\n"
    assert done.stderr == ""


FORKED = """
import multiprocessing, os, sys, threading
from lm.prepare.encoder import Encoder
from lm.prepare.learn import train_bpe
text = open("README.md").read()
encoder = Encoder(train_bpe([text], 500), sys.argv[1])
encoder.encode([text.encode()])
lines = [line.encode() for line in text.splitlines() if line] * int(sys.argv[2])
def work(_):
    return int(encoder.encode(lines)[0].sum())
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(len(set(pool.map(work, range(4)))))
"""


CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = [GPT2, *(pytest.param(pattern, marks=pytest.mark.soak) for pattern in (CL100K, O200K))]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_character_is_classed_alike_or_known_not_to_be(pattern):
    """A tokenizer that merges a character with each neighbour unless the pattern parts them."""
    characters = byte_characters()
    pairs = [
        pair
        for probe in map(ord, "aA1. ")
        for pair in [(probe, b) for b in range(0xC2, 0xF5)] + [(b, probe) for b in range(128, 192)]
    ]
    merges = [(characters[left], characters[right]) for left, right in pairs]
    tokens = [*sorted(characters), *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([END_TOKEN])
    encoder = Encoder(other_pattern(Tokenizer(backend), pattern), "gigatoken")

    def differ(text):
        return encoder._gigatoken._library.encode(
            text.encode()
        ).tolist() != encoder.tokenizer.encode(text)

    private = {*range(0xD800, 0xF900), *range(0x40000, 0xE0000), *range(0xF0000, 0x110000)}
    codes = [code for code in range(128, 0x110000) if code not in private]
    unlike = set()
    for start in range(0, len(codes), 64):
        texts = [f"a{c}1A{c}a {c}." for c in map(chr, codes[start : start + 64])]
        if differ("".join(texts)):
            unlike |= {text[1] for text in texts if differ(text)}
    assert len(unlike) > 4000  # else NEWER_CHARACTERS is no longer needed
    assert all(has_newer_characters(f"a{character}1".encode()) for character in unlike)
    assert not any(map(has_newer_characters, map(str.encode, MIXED)))
    documents = [f"a{character}1".encode() for character in sorted(unlike)]
    documents += ["".join(sorted(unlike)).encode() + CODE.encode()]  # its beginning is compared
    expected = encoder.tokenizer.encode_batch([document.decode() for document in documents])
    assert split(*encoder.encode(documents)) == expected
    assert split(*encoder.encode(documents[-1:])) == expected[-1:]


def test_only_the_texts_with_newer_characters_go_to_the_slow_library(encoder, bpe):
    texts = ["one", "\ua7ce two", "three 東京", "four", "\ua7ce", "\ua7cf five"]
    before = encoder._gigatoken._n_encoded
    assert split(*encoder.encode([text.encode() for text in texts])) == bpe.encode_batch(texts)
    assert encoder._gigatoken._n_encoded == before + 3


@pytest.mark.parametrize("library", ["gigatoken", "tokenizers"])
def test_it_works_in_forked_workers_in_silence(library):
    done = subprocess.run(
        [sys.executable, "-c", FORKED, library, {"gigatoken": "100", "tokenizers": "1"}[library]],
        cwd=ROOT,
        capture_output=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == (b"1\n", b"")


def test_refusals_travel_between_processes():
    error = pickle.loads(pickle.dumps(DocumentRefused(3, "why")))
    assert (error.index, str(error), error.exit_code) == (3, "why", 2)


def test_words_in_any_order_keep_their_ids_while_the_cache_is_renewed(bpe, monkeypatch):
    monkeypatch.setattr(lm.prepare.gigatoken_guard, "CACHE_BYTES", 0)
    encoder = Encoder(bpe, "gigatoken")
    words = ENGLISH.split(" ")
    for i in range(5):
        random.Random(i).shuffle(words)
        text = " ".join(words)
        assert encoder.encode([text.encode()])[0].tolist() == bpe.encode(text)
