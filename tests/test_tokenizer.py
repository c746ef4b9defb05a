"""Tokenizers against an independent trainer, tiktoken and transformers."""

import json
import os
import subprocess
import sys
import time
import unicodedata
from collections import Counter

import gigatoken
import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lm.base.errors import EnvironmentFault, InputError
from lm.data.tokenizer import (
    END_TOKEN,
    LONG_RUN,
    byte_characters,
    byte_tokenizer,
    load_tokenizer,
    open_tokenizer_json,
)
from lm.prepare.foreign import foreign_tokenizer, from_tiktoken
from lm.prepare.gigatoken_guard import LARGE_BYTES, learn, split_at_nul
from lm.prepare.learn import _with_long_runs_cut, train_bpe, train_bpe_large
from tests import reference
from tests.project import ROOT

TEXTS = [
    "def low(lower, newest):\n    return widest  # the lowest\n",
    "It's 2026; don't   panic:  naïve café, Ωμέγα, 東京, 🙂🙂\n\n\n\tend",
    "low low low lower newest newest widest widest widest",
] * 3


SOURCE = (ROOT / "lm" / "data" / "tokenizer.py").read_text()
HEX_ORDER = {byte: byte for byte in range(256)}
GPT2_ORDER = {
    byte: i for i, byte in enumerate(sorted(range(256), key=byte_characters().__getitem__))
}


def words(texts):
    """How often the pattern gives each piece of the texts, as bytes."""
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = Counter(piece for text in texts for piece, _ in split.pre_tokenize_str(text))
    return {spelled(piece): count for piece, count in pieces.items()}


def spelled(token):
    return bytes(map(byte_characters().index, token))


def test_training_equals_an_independent_trainer():
    texts = [*TEXTS, SOURCE]
    tokenizer = train_bpe(texts, 256 + 300 + 1)
    expected = reference.train_bpe(words(texts), 300, GPT2_ORDER, lambda pair, tokens: pair)
    model = json.loads(tokenizer.backend.to_str())["model"]
    assert [tuple(map(spelled, pair)) for pair in model["merges"]] == expected
    tokens = [*map(bytes, zip(GPT2_ORDER)), *(left + right for left, right in expected)]
    assert {spelled(token): i for token, i in model["vocab"].items()} == {
        token: i for i, token in enumerate(tokens)
    }
    assert tokenizer.end_id == 556
    assert tokenizer.vocab_size == 557


@pytest.mark.parametrize(
    ("name", "order"), [("huggingface", GPT2_ORDER), ("raw_token_ids", HEX_ORDER)]
)
def test_gigatoken_learns_the_same_merges_under_each_tie_rule(name, order):
    texts = [*TEXTS, SOURCE]
    joined = "\0".join(texts).encode()
    _, merges = gigatoken.train_bpe(joined, 256 + 600, [], name, b"\0")
    expected = reference.train_bpe(words(texts), 600, order, lambda pair, tokens: pair)
    assert merges == expected
    by_bytes = reference.train_bpe(
        words(texts), 600, order, lambda pair, tokens: [-b for i in pair for b in tokens[i]]
    )
    assert by_bytes != expected  # the rule matters


LARGE = [
    *(path.read_text() for folder in ("lm", "tests") for path in (ROOT / folder).rglob("*.py")),
    "no token spans two documents" * 9 + END_TOKEN * 99,
]
NEWER = "\ua7ce\ua7ce letters of Unicode 17"


def test_a_large_corpus_gives_the_same_tokenizer_by_either_library(monkeypatch, capfd):
    monkeypatch.setattr("lm.prepare.gigatoken_guard.LARGE_BYTES", 1 << 19)
    joined = "\0".join([*LARGE, NEWER * 1000]).encode()
    fast = train_bpe_large(joined, 2000).backend.to_str()
    assert learn("\0".join(LARGE).encode(), 1999) is not None
    monkeypatch.setitem(sys.modules, "gigatoken", None)  # its import now fails
    assert train_bpe_large(joined, 2000).backend.to_str() == fast
    assert train_bpe(LARGE, 2000).backend.to_str() == fast
    assert train_bpe([*LARGE, NEWER * 1000], 2000).backend.to_str() != fast
    os.write(1, b"out")  # what gigatoken prints is discarded, and no more than that
    os.write(2, b"error")
    assert capfd.readouterr() == ("out", "error")


@pytest.mark.soak
def test_32_megabytes_give_the_same_tokenizer_by_either_library():
    rng = np.random.default_rng(0)
    known = list(words(LARGE))
    drawn = rng.zipf(1.2, size=8 << 20) % len(known)
    joined = b"".join(known[i] for i in drawn).replace(b"\n\n", b"\0")
    assert len(joined) > LARGE_BYTES
    assert learn(joined, 4999) is not None
    fast = train_bpe_large(joined, 5000).backend.to_str()
    assert fast == train_bpe(map(bytes.decode, split_at_nul(joined)), 5000).backend.to_str()


@given(st.lists(st.text(st.sampled_from("ab1² .-\u0301\n\u3000_é")), max_size=4))
def test_only_words_of_many_characters_are_cut(texts):
    """As the words are that `tokenizers` finds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm.prepare.learn.LONG_RUN", 4)
        cut = _with_long_runs_cut("\0".join(texts).encode()).decode().split("\0")
    assert "".join(cut) == "".join(texts)
    assert max(map(longest_word, cut)) <= 4
    longest = max(map(longest_word, texts), default=0)
    assert longest > 4 or list(filter(None, cut)) == list(filter(None, texts))


def longest_word(text):
    """In characters, the space before it not counted."""
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = (text[a:b] for _, (a, b) in split.pre_tokenize_str(text))
    return max((len(word if word.isspace() else word.lstrip(" ")) for word in words), default=0)


@pytest.mark.parametrize("unit", ["acgt", "é", "\u0301", "7", "=-", " \n\t", "\u3000 "])
def test_a_run_without_a_word_break_is_learnt_in_pieces(monkeypatch, unit):
    text = "def f():\n    return 1 " + unit * 1000 + "!"
    monkeypatch.setattr("lm.prepare.gigatoken_guard.LARGE_BYTES", 1 << 30)
    by_tokenizers = train_bpe_large(text.encode(), 300).backend.to_str()
    pieces = _with_long_runs_cut(text.encode()).decode().split("\0")
    assert len(pieces) == 1 + (1000 * len(unit) - 1) // LONG_RUN or unit.isspace()
    assert max(map(longest_word, pieces)) <= LONG_RUN
    assert by_tokenizers == train_bpe(pieces, 300).backend.to_str()


def test_a_million_letters_are_learnt_in_seconds():
    letters = np.random.default_rng(0).choice(list(b"acgt"), 1_000_000).astype(np.uint8).tobytes()
    started = time.process_time()
    assert train_bpe_large(letters, 400).vocab_size == 400
    assert time.process_time() - started < 60  # by the square of the length: more than 180


def test_a_small_corpus_is_left_to_tokenizers():
    joined = "\0".join(TEXTS).encode()
    assert train_bpe_large(joined, 400).backend.to_str() == train_bpe(TEXTS, 400).backend.to_str()


def test_when_pairs_run_out_no_made_up_merge_is_learnt(monkeypatch):
    """gigatoken goes on with pairs that no longer occur."""
    monkeypatch.setattr("lm.prepare.gigatoken_guard.LARGE_BYTES", 0)
    _, merges = gigatoken.train_bpe(b"low lower", 300, [], "huggingface", b"\0")
    possible = reference.train_bpe(words(["low lower"]), 300, GPT2_ORDER, lambda pair, _: pair)
    assert len(merges) > len(possible)
    tokenizer = train_bpe_large(b"low lower", 300)
    learnt = json.loads(tokenizer.backend.to_str())["model"]["merges"]
    assert [tuple(map(spelled, pair)) for pair in learnt] == possible


def test_training_gives_the_same_bytes_for_any_thread_count_and_hash_seed():
    program = (
        "import sys; from pathlib import Path; from lm.prepare.learn import train_bpe;"
        "texts = [p.read_text() for p in sorted(Path('lm').glob('*.py'))] * 3;"
        "sys.stdout.write(train_bpe(texts, 1500).backend.to_str())"
    )
    outputs = set()
    for threads, hash_seed in [("1", "0"), ("2", "1"), ("4", "2"), ("4", "3"), ("7", "4")]:
        environment = {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": hash_seed, "PATH": ""}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True
        )
        assert done.returncode == 0, done.stderr
        outputs.add(done.stdout)
    assert len(outputs) == 1


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS, 400)


KINDS = pytest.mark.parametrize("kind", ["bpe", "bytes"])
PIECES = st.one_of(st.text(), st.sampled_from(["<|endoftext|>", "low", " low", "\0", "\r\n", "Ġ"]))


@KINDS
@given(text=st.lists(PIECES).map("".join))
def test_any_text_comes_back(bpe, kind, text):
    tokenizer = bpe if kind == "bpe" else byte_tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


@KINDS
@given(data=st.binary())
def test_any_bytes_are_spelled_by_ids(bpe, kind, data):
    tokenizer = bpe if kind == "bpe" else byte_tokenizer()
    ids = {tokenizer.decode_bytes([i]): i for i in range(tokenizer.vocab_size)}
    if kind == "bytes":
        data = data.replace(b"\xff", b"")  # its end token: never in UTF-8
    spelled = [ids[bytes([byte])] for byte in data]
    assert tokenizer.decode_bytes(spelled) == data


@KINDS
@given(draws=st.lists(st.integers(0, 2**63)))
def test_any_ids_decode_as_hugging_face_decodes_them(bpe, kind, draws):
    tokenizer = bpe if kind == "bpe" else byte_tokenizer()
    ids = [draw % tokenizer.vocab_size for draw in draws]
    assert tokenizer.decode(ids) == tokenizer.backend.decode(ids, skip_special_tokens=False)


@KINDS
def test_special_text_is_plain_unless_allowed(bpe, kind):
    tokenizer = bpe if kind == "bpe" else byte_tokenizer()
    text = "a<|endoftext|>b"
    plain = tokenizer.encode(text)
    assert tokenizer.end_id not in plain
    assert tokenizer.decode(plain) == text
    special = tokenizer.encode(text, allow_special=True)
    assert special.count(tokenizer.end_id) == 1
    assert tokenizer.encode(text) == plain  # asking once changes nothing later
    assert tokenizer.byte_lengths[special].sum() == 2


def test_bytes_are_their_own_ids():
    tokenizer = byte_tokenizer()
    assert tokenizer.vocab_size == 256
    assert tokenizer.encode("aé\n") == list("aé\n".encode())
    assert tokenizer.end_id == 255
    assert tokenizer.byte_lengths.tolist() == [1] * 255 + [0]


def test_saved_tokenizer_opens_here_and_in_transformers(bpe, tmp_path):
    for name, tokenizer in {"bpe": bpe, "bytes": byte_tokenizer()}.items():
        folder = tmp_path / name
        tokenizer.save(folder)
        ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
        for text in TEXTS:
            assert ours.encode(text) == tokenizer.encode(text)
            assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert theirs.eos_token_id == tokenizer.end_id


@pytest.fixture
def encoding(bpe, monkeypatch):
    """A tiktoken encoding with our BPE's ranks, known to tiktoken by name."""
    model = json.loads(bpe.backend.to_str())["model"]
    to_bytes = bpe._bytes_of_id
    ranks = {to_bytes[i]: i for token, i in model["vocab"].items()}
    gpt2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    special = {"<|endoftext|>": 410, "<|pad|>": 405}
    made = tiktoken.Encoding("ours", pat_str=gpt2, mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "ours", made)
    return made


def test_a_tiktoken_encoding_keeps_its_ids(encoding, bpe, tmp_path):
    tokenizer = from_tiktoken("ours", TEXTS)
    assert tokenizer.vocab_size == 411
    assert tokenizer.end_id == 410
    tokenizer.save(tmp_path)
    for text in [*TEXTS, "x<|endoftext|>", "   \n\n  a  "]:
        assert load_tokenizer(tmp_path).encode(text) == encoding.encode_ordinary(text)


def test_an_encoding_that_cannot_be_kept_is_refused(encoding, monkeypatch):
    monkeypatch.setattr(encoding, "encode_ordinary", lambda text: [0])
    with pytest.raises(InputError, match="ids differ from tiktoken's"):
        from_tiktoken("ours", TEXTS)


def test_an_unknown_encoding_is_named():
    with pytest.raises(InputError, match="tokenizer.source = gpt9: tiktoken has only .*gpt2"):
        from_tiktoken("gpt9", [])


def test_an_encoding_that_cannot_be_fetched_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(EnvironmentFault, match="could not fetch its data"):
        from_tiktoken("gpt2", [])


def test_a_tokenizer_of_another_kind_is_refused(tmp_path, bpe):
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(InputError, match="not a tokenizer.json"):
        open_tokenizer_json(file, "<|endoftext|>")
    with pytest.raises(InputError, match="no such file"):
        open_tokenizer_json(tmp_path / "missing.json", "<|endoftext|>")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    words.save(str(file))
    with pytest.raises(InputError, match="not byte-level"):
        open_tokenizer_json(file, "<|endoftext|>")
    lower = tokenizers.Tokenizer.from_str(bpe.backend.to_str())
    lower.normalizer = tokenizers.normalizers.Lowercase()
    lower.save(str(file))
    with pytest.raises(InputError, match="its normalizer Lowercase alters text"):
        open_tokenizer_json(file, "<|endoftext|>")
    bpe.backend.save(str(file))
    with pytest.raises(InputError, match=r"no special token '</s>'.*<\|endoftext\|>"):
        open_tokenizer_json(file, "</s>")


def with_pattern(bpe, file, pattern):
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    backend = tokenizers.Tokenizer.from_str(bpe.backend.to_str())
    plain = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, plain])
    backend.save(str(file))
    return file


def test_a_foreign_tokenizer_keeps_its_ids(bpe, tmp_path):
    file = with_pattern(bpe, tmp_path / "foreign.json", r" ?\w+|\s+|.")
    foreign = foreign_tokenizer(file, TEXTS)
    assert foreign.encode("low  lower") == open_tokenizer_json(file, END_TOKEN).encode("low  lower")


@pytest.mark.parametrize("parts", [None, [], ["NFC"]])
def test_text_in_nfc_keeps_its_ids_without_the_normalizer_and_other_text_its_bytes(
    bpe, tmp_path, parts
):
    nfc = tokenizers.normalizers.NFC()
    of_qwen = tokenizers.Tokenizer.from_str(bpe.backend.to_str())
    of_qwen.normalizer = (
        nfc if parts is None else tokenizers.normalizers.Sequence([nfc for _ in parts])
    )
    of_qwen.save(str(tmp_path / "tokenizer.json"))
    ours = foreign_tokenizer(tmp_path / "tokenizer.json", TEXTS)
    for text in [*TEXTS, "café naïve Ωμέγα 각 東京"]:
        assert ours.encode(text) == of_qwen.encode(text, add_special_tokens=False).ids
    for text in ("cafe\u0301", "\u2126\u212b", "\u1100\u1161\u11a8"):
        assert unicodedata.normalize("NFC", text) != text
        assert ours.decode(ours.encode(text)) == text
    ours.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs("cafe\u0301").input_ids == ours.encode("cafe\u0301")


def test_ids_that_no_token_has_are_known_and_spell_nothing(bpe, tmp_path):
    content = json.loads(bpe.backend.to_str())
    moved = {token: i + 7 for token, i in content["model"]["vocab"].items() if i >= 258}
    content["added_tokens"][0]["id"] += 7
    content["model"]["vocab"].update(moved, **{END_TOKEN: bpe.end_id + 7})
    (tmp_path / "gaps.json").write_text(json.dumps(content))
    with_gaps = foreign_tokenizer(tmp_path / "gaps.json", TEXTS)
    with_gaps.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ids = [*range(with_gaps.vocab_size)]
    assert with_gaps.n_unused == 7
    assert with_gaps.decode(ids) == theirs.decode(ids)
    assert with_gaps.byte_lengths.sum() == bpe.byte_lengths.sum()
    with pytest.raises(KeyError):
        with_gaps.decode([with_gaps.vocab_size])


def test_a_pattern_that_takes_years_is_stopped(bpe, tmp_path, monkeypatch):
    """Each match stays below the library's limit of retries, but there is one at every place."""
    monkeypatch.setattr("lm.prepare.foreign.TRIAL_SECONDS", 3)
    file = with_pattern(bpe, tmp_path / "foreign.json", "(?:a{1,60}){1,3}b|.")
    started = time.monotonic()
    with pytest.raises(
        InputError, match="foreign.json: not done with a few megabytes of text after 3 s"
    ):
        foreign_tokenizer(file, [])
    assert time.monotonic() - started < 30


def test_a_text_at_which_the_library_panics_is_an_input_error(bpe, tmp_path):
    file = with_pattern(bpe, tmp_path / "foreign.json", r"(a+)+$")
    with pytest.raises(InputError, match="the tokenizer cannot encode a text: Onig: Regex search"):
        open_tokenizer_json(file, END_TOKEN).encode("a" * 50 + "!")


def test_a_text_of_the_user_is_tried_too(bpe, tmp_path):
    file = with_pattern(bpe, tmp_path / "foreign.json", r"(?:xy)+(?:xy)+(?:xy)+(?:xy)+z|.")
    foreign_tokenizer(file, ["xy" * 10])
    with pytest.raises(InputError, match="foreign.json: the tokenizer cannot encode a text: Onig"):
        foreign_tokenizer(file, ["xy" * 400])


def test_an_end_token_that_text_can_hold_is_refused():
    for make in (byte_tokenizer, lambda end: train_bpe(TEXTS, 300, end)):
        with pytest.raises(InputError, match="tokenizer.end_token = a: plain text gives this"):
            make("a")
