"""Token files: verified when opened; batches: pure functions of (seed, step)."""

import json
import os
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from lm.base import rng
from lm.base.errors import InputError
from lm.base.files import sha256_file
from lm.data.order import DocumentWindows, deal
from lm.data.shards import ShardWriter, write_manifest
from lm.data.splits import Split, open_tokens, windows
from lm.data.token_stream import OPEN_FILES
from lm.data.tokenizer import Tokenizer, byte_tokenizer
from lm.evaluate.baselines import Bigram
from lm.prepare.learn import train_bpe
from tests.project import change, write_tokens

DOCUMENTS = [
    ("train", "first text"),
    ("valid", "held out"),
    ("train", "second\ntext é"),
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
    write_tokens(tmp_path, DOCUMENTS, tokenizer)
    tokens = open_tokens(tmp_path)
    assert tokens.train.tokens.dtype == np.uint32
    assert tokens.train.tokens[:].max() == tokenizer.end_id > 65_535


def test_an_unfinished_folder_is_refused(folder):
    (folder / "tokens.json").unlink()
    with pytest.raises(InputError, match=r"tokens.json: no such file"):
        open_tokens(folder)


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
        ("truncated", "train/text-00000.bin: 49 bytes, but tokens.json says 52"),
        ("extended", "train/text-00000.bin: 54 bytes, but tokens.json says 52"),
        ("flipped", "train/text-00000.bin: content differs from the hash"),
    ],
)
def test_a_damaged_file_is_found_when_opened(folder, how, message):
    damage(folder / "train" / "text-00000.bin", how)
    with pytest.raises(InputError, match=message):
        open_tokens(folder)


def test_foreign_past_and_future_folders_are_refused(folder):
    with pytest.raises(InputError, match="made with another tokenizer"):
        open_tokens(folder, "another-hash")
    manifest = json.loads((folder / "tokens.json").read_text())
    (folder / "tokens.json").write_text(json.dumps(manifest | {"format": 9}))
    with pytest.raises(InputError, match=r"a newer version \(format 9, this one reads 2\)$"):
        open_tokens(folder)
    first = {"format": 1, "dtype": "uint16", "vocab_size": 256, "end_id": 255}
    (folder / "tokens.json").write_text(json.dumps(first))
    with pytest.raises(InputError, match=r"older version \(format 1, .*; run `dvc repro tokens`"):
        open_tokens(folder)
    (folder / "tokens.json").write_text('{"format": 2,')
    with pytest.raises(InputError, match="not valid JSON"):
        open_tokens(folder)
    (folder / "tokens.json").write_text(json.dumps(manifest))
    (folder / "valid" / "text-00000.bin").unlink()
    with pytest.raises(InputError, match=r"valid/text-00000.bin: no such file"):
        open_tokens(folder)


def changed(manifest, place, value):
    """A manifest with another value, or none, at a place such as "shards.0.train.file"."""
    manifest = json.loads(json.dumps(manifest))
    change(manifest, place.split("."), value)
    return manifest


NOT_ONE = r"tokens.json: not a token manifest; run `dvc repro tokens`"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("shards", None, NOT_ONE),
        ("format", True, NOT_ONE),
        ("dtype", "float64", NOT_ONE),
        ("dtype", "uint32", NOT_ONE),  # 256 ids need two bytes
        ("end_id", 256, NOT_ONE),
        ("train.tokens", None, NOT_ONE),
        ("train.tokens", 26.0, NOT_ONE),
        ("sources.0.weight", None, NOT_ONE),
        ("sources.0.weight", "much", NOT_ONE),
        ("sources.0.weight", 10**400, "must be in"),
        ("sources.0.weight", float("nan"), "must be in"),
        ("sources.0.weight", -1, "source text has the weight -1, must be in"),
        ("shards.0.valid", [], NOT_ONE),
        ("shards.0.train.tokens", -26, NOT_ONE),
        ("shards.0.train.tokens", 10**30, NOT_ONE),
        ("shards.0.train.bytes", 1 << 63, NOT_ONE),
        ("shards.0.train.documents", 27, NOT_ONE),  # each has an end token
        ("shards.0.valid.tokens", 0, NOT_ONE),  # of 8 bytes
        ("shards.0.train.sha256", 5, NOT_ONE),
        ("shards.0.source", "another", "shards do not stand in the order of its sources"),
        ("shards.0.train.tokens", 25, "26 tokens in train, but its shards have 25"),
        ("valid.bytes", 9, "9 bytes in valid, but its shards have 8"),
        (
            "shards.0.train.file",
            "../../secret.bin",
            "'../../secret.bin' is not a file in its folder",
        ),
        ("shards.0.train.file", "/etc/secret.bin", "'/etc/secret.bin' is not a file in its folder"),
        ("shards.0.train.file", "train/../x.bin", "'train/../x.bin' is not a file in its folder"),
        ("shards.0.train.file", "valid/text-00000.bin", "names a file twice"),
        ("shards.0.train.file", "train/other.bin", "train/other.bin: no such file"),
    ],
)
def test_a_manifest_that_is_none_or_contradicts_itself_is_refused(folder, place, value, message):
    manifest = json.loads((folder / "tokens.json").read_text())
    (folder / "tokens.json").write_text(json.dumps(changed(manifest, place, value)))
    with pytest.raises(InputError, match=message) as caught:
        open_tokens(folder)
    assert "\n" not in str(caught.value)


def rewrite(folder, file, place, token_id, sealed):
    """Put an id into a shard, in place; sealed, the manifest agrees with it."""
    with open(folder / file, "r+b") as shard:
        os.pwrite(shard.fileno(), token_id.to_bytes(2, "little"), 2 * place)
    if sealed:
        manifest = json.loads((folder / "tokens.json").read_text())
        split = file.split("/")[0]
        manifest["shards"][0][split]["sha256"] = sha256_file(folder / file)
        (folder / "tokens.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("token_id", [256, 65535])
@pytest.mark.parametrize("file", ["train/text-00000.bin", "valid/text-00000.bin"])
def test_ids_beyond_the_vocabulary_are_found_when_opened_though_the_hash_agrees(
    folder, file, token_id
):
    rewrite(folder, file, 7, token_id, sealed=True)
    message = f"{file}: token 7 has id {token_id}, but the vocabulary has 256 ids; run `dvc"
    with pytest.raises(InputError, match=message):
        open_tokens(folder)
    rewrite(folder, file, 7, 255, sealed=True)
    assert open_tokens(folder).train.tokens[:].max() == 255


def test_ids_beyond_the_vocabulary_are_found_in_files_rewritten_after_they_were_opened(tmp_path):
    write_shards(tmp_path, [500])
    split = open_tokens(tmp_path).train
    assert split.tokens[:].max() == 999  # from now on the files are open
    with open(tmp_path / "train" / "source0-00001.bin", "r+b") as shard:
        os.pwrite(shard.fileno(), b"\xe8\x03", 2 * 40)
    message = "train/source0-00001.bin: token 40 has id 1000, but the vocabulary has 1000 ids"
    for read in (
        lambda: windows(split.tokens, np.array([3, 530, 480]), 20),
        lambda: windows(split.tokens, np.array([495, 3]), 50),
        lambda: split.batch(0, 100, 20, 1, "random"),
        lambda: Bigram(split.tokens, 1000),
        lambda: split.tokens[400:600],
    ):
        with pytest.raises(InputError, match=message):
            read()
    np.testing.assert_array_equal(split.tokens[:540], np.arange(540))


@pytest.mark.parametrize(("name", "value"), [("vocab_size", 257), ("end_id", 254)])
def test_tokens_and_tokenizer_must_have_one_vocabulary_and_one_end(folder, name, value):
    manifest = json.loads((folder / "tokens.json").read_text())
    (folder / "tokens.json").write_text(json.dumps(manifest | {name: value}))
    message = rf"tokens.json: {name} = {value}, but the tokenizer's is 25\d; run `dvc repro tokens`"
    with pytest.raises(InputError, match=message):
        open_tokens(folder, "tokenizer-hash", byte_tokenizer())


@pytest.mark.parametrize("content", ["{}", "[]", "3", '"text"', "null"])
def test_json_that_is_no_manifest_is_refused(folder, content):
    (folder / "tokens.json").write_text(content)
    with pytest.raises(InputError, match=NOT_ONE):
        open_tokens(folder)


def write_shards(folder, cuts, weights=(None,), dtype="<u2", shares=None, ends=()):
    """The ids 0 .. 999 as training split, cut into shards; `shares` are the shards of each source.

    Id 0 ends a document; it stands at `ends` too.
    """
    ids, shards = np.arange(1000), []
    ids[list(ends)] = 0
    sources = [{"name": f"source{i}", "weight": weight} for i, weight in enumerate(weights)]
    shares = shares or [len(cuts) + 1 - len(weights) + 1] + [1] * (len(weights) - 1)
    owners = [source["name"] for source, n in zip(sources, shares, strict=True) for _ in range(n)]
    for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, 1000], strict=True)):
        source = owners[number]
        shard = {"source": source}
        for split, part in (("train", ids[start:stop]), ("valid", ids[:0])):
            path = folder / split / f"{source}-{number:05}.bin"
            with ShardWriter(path, np.dtype(dtype)) as writer:
                for piece in np.array_split(part, 3):
                    writer.append(piece, len(piece), min(1, len(piece)))
            shard[split] = writer.entry()
        shards.append(shard)
    return write_manifest(
        folder,
        vocab_size=1000 if dtype == "<u2" else 100_000,
        end_id=0,
        tokenizer_sha256="",
        sources=sources,
        shards=shards,
    )


@pytest.mark.parametrize("cuts", [[], [500], [1, 1, 2, 3, 40], list(range(0, 1000, 7))], ids=len)
@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_where_shards_are_cut_changes_no_slice_and_no_window(tmp_path, cuts, dtype):
    write_shards(tmp_path, cuts, dtype=dtype)
    split = open_tokens(tmp_path).train
    assert split.tokens.dtype == np.dtype(dtype)
    assert split.n_bytes == len(split.tokens) == 1000
    for place in (slice(None), slice(3, 9), slice(990, 2000), slice(9, 3), slice(-4, None)):
        np.testing.assert_array_equal(split.tokens[place], np.arange(1000)[place])
    starts = np.arange(0, 1000 - 20, 3)
    for mine, expected in zip(
        windows(split.tokens, starts, 20), windows(np.arange(1000), starts, 20), strict=True
    ):
        np.testing.assert_array_equal(mine, expected)
    assert windows(split.tokens, starts[:0], 20)[0].shape == (0, 20)


def test_many_shards_do_not_use_up_the_descriptors(tmp_path):
    def count_open():
        return len(list(Path("/dev/fd").iterdir()))

    write_shards(tmp_path, list(range(1, 1000, 2)))
    before = count_open()
    split = open_tokens(tmp_path).train
    np.testing.assert_array_equal(split.tokens[:], np.arange(1000))
    split.batch(0, 100, 30, 0, "random")
    assert count_open() == before + OPEN_FILES
    del split
    assert count_open() == before


def test_a_shard_that_is_replaced_after_it_was_verified_is_verified_again(tmp_path):
    write_shards(tmp_path, [500])
    split = open_tokens(tmp_path).train
    shard, other = sorted((tmp_path / "train").iterdir())
    content = shard.read_bytes()
    for replacement, message in (
        (content[::-1], "source0-00000.bin: content differs from the hash"),
        (content[:-2], "source0-00000.bin: 998 bytes, but tokens.json says 1000"),
        (content, None),  # as `dvc checkout` brings it back
    ):
        shard.rename(tmp_path / "old")
        shard.write_bytes(replacement)
        with nullcontext() if message is None else pytest.raises(InputError, match=message):
            assert split.tokens[2:5].tolist() == [2, 3, 4]
    other.unlink()
    with pytest.raises(InputError, match=r"source0-00001.bin: no such file"):
        split.tokens[498:502]


def test_a_manifest_with_weights_for_some_sources_is_refused(tmp_path):
    with pytest.raises(InputError, match="source source1 has no weight, others have; give each"):
        write_shards(tmp_path, [300], weights=(0.5, None))
    assert not (tmp_path / "tokens.json").exists()


SPLIT = Split("train", np.arange(1000, dtype=np.uint16), 0)


@pytest.mark.parametrize("sampling", ["random", "epochs", "documents"])
def test_a_batch_is_a_pure_function_of_seed_and_step(sampling):
    SPLIT = Split("train", np.arange(1000, dtype=np.uint16), 0, end_id=300)
    x, y = SPLIT.batch(7, 5, 16, 1337, sampling)
    assert x.shape == y.shape == (5, 16)
    assert x.dtype == np.int64
    np.testing.assert_array_equal(y, x + 1)
    for step in (3, 7, 900):  # whatever was dealt before
        SPLIT.batch(step, 5, 16, 1337, sampling)
    np.testing.assert_array_equal(x, SPLIT.batch(7, 5, 16, 1337, sampling)[0])
    assert (x != SPLIT.batch(8, 5, 16, 1337, sampling)[0]).any()
    assert (x != SPLIT.batch(7, 5, 16, 1338, sampling)[0]).any()


def starts_before(n_tokens, step, batch_size, context_length, seed, sampling):
    """The places of windows as they were dealt before there were shards and sources."""
    if sampling == "random":
        key = rng.seed(seed, "batch", step)
        return rng.random_integers(key, batch_size, n_tokens - context_length)
    n_windows = (n_tokens - 1) // context_length
    epochs, places = np.divmod(step * batch_size + np.arange(batch_size), n_windows)
    starts = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        mine, key = epochs == epoch, rng.seed(seed, "epoch", int(epoch))
        starts[mine] = rng.permuted(key, places[mine], n_windows) * context_length
    return starts


@pytest.mark.parametrize("sampling", ["random", "epochs"])
@pytest.mark.parametrize("batch_size", [1, 7, 2000])
def test_a_text_of_one_source_is_dealt_as_before_there_were_sources(sampling, batch_size):
    for seed, step in ((0, 0), (1337, 1), (1337, 400), (5, 10**9)):
        case = step, batch_size, 16, seed, sampling
        np.testing.assert_array_equal(SPLIT.starts(*case), starts_before(1000, *case))


@pytest.mark.parametrize("sampling", ["random", "epochs", "documents"])
def test_where_shards_are_cut_changes_no_batch(tmp_path, sampling):
    batches = []
    for cuts in ([300], [3, 4, 77, 150, 299, 300, 300, 512, 700, 999]):
        # the first source is what lies before token 300
        weights = (2.0, 0.5)
        folder = tmp_path / str(len(cuts))
        shares = [sum(cut < 300 for cut in cuts) + 1, sum(cut >= 300 for cut in cuts)]
        write_shards(folder, cuts, weights, shares=shares)
        split = open_tokens(folder).train
        batches.append([split.batch(step, 6, 20, 1, sampling)[0] for step in range(40)])
    np.testing.assert_array_equal(*batches)


weights = st.lists(
    st.floats(1e-3, 1e3) | st.sampled_from([0.1, 0.2, 0.7, 1, 3]), min_size=1, max_size=9
)


@given(weights, st.integers(0, 10**12))
def test_every_source_has_its_share_after_any_number_of_windows(weights, first):
    shares = [Fraction(str(w)) / sum(Fraction(str(w)) for w in weights) for w in weights]
    bound = {1: 0, 2: Fraction(1, 2), 3: 1}.get(len(weights), Fraction("1.68"))
    numbers = np.arange(first, first + 200)
    sources, within = deal(tuple(weights), numbers)
    for number, share in enumerate(shares):
        mine = sources == number
        # `within` counts the windows a source has had since the beginning of the run
        for n, count in zip(numbers[mine].tolist(), within[mine].tolist(), strict=True):
            assert abs(count - n * share) <= bound
            assert abs(count + 1 - (n + 1) * share) <= bound
        if mine.any():
            np.testing.assert_array_equal(np.diff(within[mine]), 1)


def test_shares_of_sources_are_exact_decimals():
    sources, _ = deal((0.7, 0.2, 0.1), np.arange(1000))
    for first in range(0, 1000, 10):
        assert np.bincount(sources[first : first + 10]).tolist() == [7, 2, 1]


@pytest.mark.parametrize("sampling", ["random", "epochs", "documents"])
def test_windows_of_weighted_sources_stay_inside_their_source(tmp_path, sampling):
    write_shards(tmp_path, [300, 400], (1, 6, 3), ends=range(0, 1000, 30))
    split = open_tokens(tmp_path).train
    n, bounds = 200, [0, 300, 400, 1000]
    starts = np.concatenate([split.starts(step, 5, 20, 1, sampling) for step in range(n)])
    owners = np.searchsorted(bounds, starts, side="right") - 1
    assert (starts + 21 <= np.array(bounds)[owners + 1]).all()
    assert np.bincount(owners).tolist() == [n * 5 // 10, n * 5 * 6 // 10, n * 5 * 3 // 10]
    if sampling == "epochs":  # each source walks through its own windows, epoch by epoch
        for number, size in enumerate((14, 4, 29)):
            mine = starts[owners == number] - bounds[number]
            for first in range(0, len(mine) - size + 1, size):
                assert sorted(mine[first : first + size]) == list(range(0, size * 20, 20))


def test_a_source_shorter_than_a_window_is_refused_by_name(tmp_path):
    write_shards(tmp_path, [20], (1, 1))
    with pytest.raises(
        InputError, match="source source0 has 20 tokens in the train split, but one"
    ):
        open_tokens(tmp_path).train.batch(0, 4, 20, 0, "random")


@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=300),
    context_length=st.integers(1, 30),
    tail=st.integers(0, 20),
    scanned=st.integers(1, 500),
)
def test_windows_of_documents_begin_at_their_starts(lengths, context_length, tail, scanned):
    """Against a plain loop over the documents; the tail is a document without an end."""
    ids, expected = [], []
    for length in lengths:
        expected += range(len(ids), len(ids) + length, context_length)
        ids += [*range(1, length + 1), 0]
    expected += range(len(ids), len(ids) + tail - 1, context_length)
    ids = np.array([*ids, *range(1, tail + 1)], dtype=np.uint16)
    chunks = [ids[i : i + scanned] for i in range(0, len(ids), scanned)]
    windows = DocumentWindows(chunks, 0, context_length)
    assert len(windows) == len(expected)
    numbers = np.arange(len(expected))
    np.testing.assert_array_equal(windows.starts(numbers), expected)
    np.testing.assert_array_equal(windows.starts(numbers[::-1]), expected[::-1])


def test_an_epoch_of_documents_has_each_of_their_windows_once():
    ids = np.tile(np.array([5, 5, 5, 5, 0]), 40)
    ids[:25] = 5  # a long one
    split = Split("train", ids, 0, end_id=0)
    size = 10 + 34 * 2
    starts = np.concatenate([split.starts(s, 6, 3, 9, "documents") for s in range(2 * size // 6)])
    once = [*range(0, 29, 3), *(s + i for s in range(30, 200, 5) for i in (0, 3))]
    expected = sorted(min(start, len(ids) - 4) for start in once)
    assert sorted(starts[:size]) == sorted(starts[size:]) == expected
    assert (starts[:size] != starts[size:]).any()


def test_sampling_documents_says_what_it_misses():
    with pytest.raises(InputError, match="the id that ends a document is unknown; use epochs"):
        SPLIT.batch(0, 4, 20, 0, "documents")
    empty = Split("train", np.zeros(100, dtype=np.uint16), 0, end_id=0)
    with pytest.raises(InputError, match="train: every document is empty; add text"):
        empty.batch(0, 4, 20, 0, "documents")


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
    with pytest.raises(
        InputError, match=r"train split has 1,000 tokens, but .*\+ 1 = 1,001; lower"
    ):
        SPLIT.batch(0, 1, 1000, 0, "random")
    assert SPLIT.batch(0, 1, 999, 0, "random")[0].shape == (1, 999)


def test_windows_are_the_tokens_at_their_starts():
    x, y = windows(SPLIT.tokens, np.array([10, 0]), 3)
    assert x.tolist() == [[10, 11, 12], [0, 1, 2]]
    assert y.tolist() == [[11, 12, 13], [1, 2, 3]]


def test_a_file_that_becomes_shorter_is_an_error_and_no_bus_error(folder):
    split = open_tokens(folder).train
    split.batch(0, 2, 4, seed=0, sampling="random")
    os.truncate(folder / "train" / "text-00000.bin", 10)
    assert len(split.tokens[0:5]) == 5
    with pytest.raises(InputError, match=r"-00000.bin: became shorter while it was read; run"):
        split.tokens[3:8]
