"""Token files: verified when opened; batches: pure functions of (seed, step)."""

import json
import os

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from lm.errors import InputError
from lm.text import Document
from lm.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from lm.tokens import Split, open_tokens, windows, write_tokens

DOCUMENTS = [
    ("train", Document("a", "first text")),
    ("valid", Document("b", "held out")),
    ("train", Document("c", "second\ntext é")),
]


@pytest.fixture
def folder(tmp_path):
    write_tokens(tmp_path, DOCUMENTS, byte_tokenizer(), "tokenizer-hash")
    return tmp_path


def test_files_hold_the_documents_and_their_ends(folder):
    tokens = open_tokens(folder, "tokenizer-hash")
    assert (
        bytes(tokens.train.tokens[:].astype(np.uint8))
        == "first text\xff".encode("latin-1") + "second\ntext é".encode() + b"\xff"
    )
    assert bytes(tokens.valid.tokens[:].astype(np.uint8)) == b"held out\xff"
    assert tokens.train.tokens.dtype == np.uint16
    assert tokens.train.n_bytes == 10 + 14
    assert tokens.valid.n_bytes == 8
    manifest = json.loads((folder / "tokens.json").read_text())
    assert manifest["train"]["documents"] == 2
    assert manifest["vocab_size"] == 256


def test_a_vocabulary_beyond_16_bits_takes_32(tmp_path):
    bpe = train_bpe(["text"], 300)
    model = json.loads(bpe.backend.to_str())["model"]
    vocabulary = model["vocab"] | {f"filler{i}": i for i in range(len(model["vocab"]), 70_000)}
    merges = [tuple(merge) for merge in model["merges"]]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer, backend.decoder = bpe.backend.pre_tokenizer, bpe.backend.decoder
    backend.add_special_tokens(["<|endoftext|>"])
    tokenizer = Tokenizer(backend)
    write_tokens(tmp_path, DOCUMENTS, tokenizer, "")
    tokens = open_tokens(tmp_path)
    assert tokens.train.tokens.dtype == np.uint32
    assert tokens.train.tokens[:].max() == tokenizer.end_id > 65_535


def test_batches_of_documents_change_no_byte(folder, tmp_path, monkeypatch):
    for size in (1, 15):
        monkeypatch.setattr("lm.tokens.BATCH_BYTES", size)
        again = tmp_path / str(size)
        write_tokens(again, DOCUMENTS, byte_tokenizer(), "tokenizer-hash")
        for name in ("train.bin", "valid.bin", "tokens.json"):
            assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_an_unfinished_folder_is_refused(tmp_path):
    def broken():
        yield DOCUMENTS[0]
        raise InputError("the source broke off")

    with pytest.raises(InputError, match="broke off"):
        write_tokens(tmp_path, broken(), byte_tokenizer(), "")
    with pytest.raises(InputError, match=r"tokens.json: no such file"):
        open_tokens(tmp_path)


def test_a_tokenizer_that_alters_text_is_refused(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.backend.normalizer = tokenizers.normalizers.NFD()
    with pytest.raises(InputError, match=r"c: 14 bytes of text became tokens of 15 bytes"):
        write_tokens(tmp_path, DOCUMENTS, tokenizer, "")


def damage(file, how):
    data = bytearray(file.read_bytes())
    if how == "truncated":
        del data[-3:]
    elif how == "extended":
        data += b"\x00\x00"
    elif how == "flipped":
        data[3] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "train.bin: 49 bytes, tokens.json says 52"),
        ("extended", "train.bin: 54 bytes, tokens.json says 52"),
        ("flipped", "train.bin: content differs from the hash"),
    ],
)
def test_a_damaged_file_is_found_when_opened(folder, how, message):
    damage(folder / "train.bin", how)
    with pytest.raises(InputError, match=message):
        open_tokens(folder)


def test_foreign_and_future_folders_are_refused(folder):
    with pytest.raises(InputError, match="made with another tokenizer"):
        open_tokens(folder, "another-hash")
    manifest = json.loads((folder / "tokens.json").read_text())
    (folder / "tokens.json").write_text(json.dumps(manifest | {"format": 9}))
    with pytest.raises(InputError, match=r"newer version \(format 9, this one reads <= 1\)"):
        open_tokens(folder)
    for content in ("{}", "[]", "3"):
        (folder / "tokens.json").write_text(content)
        with pytest.raises(InputError, match="not a token manifest"):
            open_tokens(folder)
    (folder / "tokens.json").write_text('{"format": 1,')
    with pytest.raises(InputError, match="not valid JSON"):
        open_tokens(folder)
    (folder / "tokens.json").write_text(json.dumps(manifest))
    (folder / "valid.bin").unlink()
    with pytest.raises(InputError, match=r"valid.bin: no such file"):
        open_tokens(folder)


SPLIT = Split("train", np.arange(1000, dtype=np.uint16), 0)


@pytest.mark.parametrize("sampling", ["random", "epochs"])
def test_a_batch_is_a_pure_function_of_seed_and_step(sampling):
    x, y = SPLIT.batch(7, 5, 16, 1337, sampling)
    assert x.shape == y.shape == (5, 16)
    assert x.dtype == np.int64
    np.testing.assert_array_equal(y, x + 1)
    for step in (3, 7, 900):  # whatever was dealt before
        SPLIT.batch(step, 5, 16, 1337, sampling)
    np.testing.assert_array_equal(x, SPLIT.batch(7, 5, 16, 1337, sampling)[0])
    assert (x != SPLIT.batch(8, 5, 16, 1337, sampling)[0]).any()
    assert (x != SPLIT.batch(7, 5, 16, 1338, sampling)[0]).any()


def test_random_windows_start_anywhere():
    split = Split("train", np.arange(21), 0)
    starts = {row[0] for step in range(60) for row in split.batch(step, 4, 16, 0, "random")[0]}
    assert starts == set(range(5))  # the last window's target is the last token


@given(
    n_tokens=st.integers(5, 400),
    context_length=st.integers(1, 30),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_window_is_seen_once_an_epoch(n_tokens, context_length, batch_size, seed):
    n_windows = (n_tokens - 1) // context_length
    if n_windows == 0:
        return
    split = Split("train", np.arange(n_tokens), 0)
    steps = -(-2 * n_windows // batch_size)
    firsts = np.concatenate(
        [split.batch(s, batch_size, context_length, seed, "epochs")[0][:, 0] for s in range(steps)]
    )
    expected = np.arange(n_windows) * context_length
    for epoch in range(2):
        mine = firsts[epoch * n_windows : (epoch + 1) * n_windows]
        np.testing.assert_array_equal(np.sort(mine), expected)


def test_a_split_shorter_than_a_window_says_what_to_do():
    with pytest.raises(InputError, match="train split has 1000 tokens, needs at least 1001; lower"):
        SPLIT.batch(0, 1, 1000, 0, "random")
    assert SPLIT.batch(0, 1, 999, 0, "random")[0].shape == (1, 999)


def test_windows_are_the_tokens_at_their_starts():
    x, y = windows(SPLIT.tokens, np.array([10, 0]), 3)
    assert x.tolist() == [[10, 11, 12], [0, 1, 2]]
    assert y.tolist() == [[11, 12, 13], [1, 2, 3]]


def test_a_file_on_disk_slices_like_an_array(folder):
    on_disk = open_tokens(folder).train.tokens
    array = np.memmap(folder / "train.bin", dtype="<u2", mode="r")
    assert len(on_disk) == len(array)
    for place in (slice(None), slice(3, 9), slice(20, 99), slice(9, 3), slice(-4, None)):
        assert np.array_equal(on_disk[place], array[place])


def test_a_file_that_becomes_shorter_is_an_error_and_no_bus_error(folder):
    split = open_tokens(folder).train
    split.batch(0, 2, 4, seed=0, sampling="random")
    os.truncate(folder / "train.bin", 10)
    assert len(split.tokens[0:5]) == 5
    with pytest.raises(InputError, match=r"train.bin: became shorter while it was read; run `dvc"):
        split.tokens[3:8]
