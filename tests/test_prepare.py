"""Text to token shards: the same bytes by any way, and nothing made twice or trusted blindly."""

import gzip
import hashlib
import io
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import zstandard

import lm.prepare.encode_shards
from lm.base.console import ByteProgress
from lm.base.errors import InputError
from lm.base.params import load_params
from lm.base.sections import read_section
from lm.base.tables import data_table
from lm.data.shards import SPLITS
from lm.data.splits import open_tokens
from lm.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer
from lm.prepare.collect import collect_shards
from lm.prepare.documents import cut_into_shards, split_documents, with_train_bytes
from lm.prepare.encode_shards import (
    Job,
    drop_unused,
    encode_all,
    encode_shard,
    require_done,
    select_part,
)
from lm.prepare.learn import train_bpe
from lm.prepare.sources import DataConfig, SourceConfig
from tests.kill import gone
from tests.project import SMOKE, one_line

# of Python 3.12; the threads of this process are those of the test runner
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
SEPARATOR = "<|end|>"


def write_notes(folder, n, first=0):
    """Short files, of one sentence or of many, here and there the same one twice."""
    folder.mkdir(exist_ok=True)
    for i in range(first, first + n):
        number = i - 3 if i % 10 == 3 else i
        sentence = f"Note {number} says {number * number % 89}.\n"
        (folder / f"{i:03}.txt").write_text(sentence * (1 + number % 3))


class Desk:
    """A text, settings, a tokenizer, and the folder where done shards are kept."""

    def __init__(self, folder, **settings):
        config = read_section(DataConfig, load_params(SMOKE), "data")
        chosen = {"path": str(folder / "text"), "valid_fraction": 0.25, "shard_bytes": 400}
        self.folder, self.text = folder, folder / "text"
        self.config = replace(config, **{**chosen, **settings})
        self.kept, self.tokens = folder / "kept", folder / "tokens"
        if not (folder / "tokenizer").exists():
            byte_tokenizer().save(folder / "tokenizer")

    def job(self, **changes):
        job = Job(self.config, self.folder / "tokenizer", "code", self.kept)
        return replace(job, **changes)

    def make(self, num_workers=1, **changes):
        """Run as stage tokens does; what then stands in the folder, and the report."""
        job, done = encode_all(self.job(**changes), self.shards(num_workers), num_workers)
        tokenizer = load_tokenizer(job.tokenizer)
        report = collect_shards(self.tokens, job, tokenizer, self.shards(), done)
        return self.files(), report

    def shards(self, num_workers=1):
        return with_train_bytes(self.config, cut_into_shards(self.config), num_workers)

    def files(self):
        return {
            file.relative_to(self.tokens).as_posix(): file.read_bytes()
            for file in self.tokens.rglob("*")
            if file.is_file()
        }

    def keys(self):
        return {file.name.split(".")[0] for file in self.kept.glob("*.json")}

    def elsewhere(self, **settings):
        """Another desk with the same text and nothing kept."""
        other = Desk(self.folder, **settings)
        other.config = replace(self.config, **settings)
        other.kept, other.tokens = (
            Path(f"{folder}-{len(list(self.folder.iterdir()))}")
            for folder in (self.kept, self.tokens)
        )
        return other

    def streams(self):
        """All ids of each split."""
        manifest = json.loads((self.tokens / "tokens.json").read_text())
        return {
            split: b"".join(
                (self.tokens / shard[split]["file"]).read_bytes() for shard in manifest["shards"]
            )
            for split in SPLITS
        }

    def texts(self):
        """The documents of each split, decoded from the tokens."""
        return {
            split: [bytes(part) for part in self._parts(stream)]
            for split, stream in self.streams().items()
        }

    def _parts(self, stream):
        ids = np.frombuffer(stream, "<u2").tolist()
        part = []
        for i in ids:
            if i == 255:
                yield part
                part = []
            else:
                part.append(i)
        assert not part


@pytest.fixture
def desk(tmp_path):
    write_notes(tmp_path / "text", 100)
    return Desk(tmp_path)


def test_the_tokens_are_the_documents_in_order(desk):
    _, report = desk.make()
    expected = {"train": [], "valid": []}
    for side, document in split_documents(desk.config, Counter()):
        expected[side].append(document.data)
    assert desk.texts() == expected
    assert len(cut_into_shards(desk.config)) > 5
    tokens = open_tokens(desk.tokens, desk.job().tokenizer_sha256)
    for split in SPLITS:
        n_bytes = sum(map(len, expected[split]))
        counts = {"tokens": n_bytes + len(expected[split]), "bytes": n_bytes}
        assert report[split] == counts | {"documents": len(expected[split])}
        assert len(getattr(tokens, split).tokens) == counts["tokens"]


def as_lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def as_table(texts, dictionary=True):
    column = pyarrow.array(texts, pyarrow.large_string())
    column = column.dictionary_encode() if dictionary else column
    made = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), made, row_group_size=7)
    return made.getvalue()


def test_a_document_that_the_tokenizer_alters_is_named(desk):
    backend = byte_tokenizer().backend
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    Tokenizer(backend, byte_tokenizer().end_token).save(desk.folder / "tokenizer")
    with pytest.raises(InputError, match=r"text/\d+.txt: \d+ bytes of text became tokens of"):
        desk.make()


def test_every_format_gives_the_same_tokens(tmp_path):
    texts = [f"text {i}\n\n of {i * i} é\U0001f600" * (i % 9 + 1) for i in range(60)]
    formats = {".txt": SEPARATOR.join(texts).encode(), ".jsonl": as_lines(texts),
               ".parquet": as_table(texts)}  # fmt: skip
    packings = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
    seen = []
    for suffix, data in formats.items():
        for packing, pack in packings.items():
            folder = tmp_path / f"as{suffix}{packing}"
            (folder / "text").mkdir(parents=True)
            (folder / "text" / f"a{suffix}{packing}").write_bytes(pack(data))
            desk = Desk(folder, separator=SEPARATOR)
            _, report = desk.make()
            assert report["documents"] == 60
            assert len(cut_into_shards(desk.config)) == 1 or not packing
            seen.append(desk.streams())
    assert seen == seen[:1] * 9


def finish_late(job, shard):
    """The first shards last."""
    time.sleep(0.3 * (shard.stretches[0].file.name < "02"))
    return encode_shard(job, shard)


@pytest.mark.parametrize("settings", [{}, {"split": "tail", "deduplicate": True}], ids=["", "tail"])
def test_the_bytes_do_not_depend_on_workers_or_chunks(desk, monkeypatch, settings):
    (desk.text / "050x.jsonl").write_bytes(as_lines(f"line {i}" for i in range(200)))
    (desk.text / "060x.parquet").write_bytes(as_table([f"row {i}" for i in range(200)]))
    desk = desk.elsewhere(**settings)
    expected = desk.make()
    assert len(expected[0]) > 30
    for num_workers in (2, 3):
        assert desk.elsewhere().make(num_workers) == expected
    monkeypatch.setattr(lm.prepare.encode_shards, "encode_shard", finish_late)
    assert desk.elsewhere().make(2) == expected
    monkeypatch.undo()
    monkeypatch.setattr(lm.prepare.encode_shards, "BATCH_BYTES", 50)
    for name in ("CHUNK_BYTES", "SEARCH_BYTES"):
        monkeypatch.setattr(f"lm.prepare.limits.{name}", 13)
    monkeypatch.setattr("lm.prepare.collect.ROWS", 3)
    assert desk.elsewhere().make() == expected


@pytest.mark.parametrize("split", ["hash", "tail"])
def test_the_ids_do_not_depend_on_the_cut_into_shards(desk, split):
    (desk.text / "050x.jsonl").write_bytes(as_lines(f"line {i}" for i in range(200)))
    streams = []
    for size in (100, 1000, 1 << 20):
        other = desk.elsewhere(split=split, shard_bytes=size, deduplicate=True)
        files, _ = other.make()
        streams.append((other.streams(), len(files)))
    assert streams[0][0] == streams[1][0] == streams[2][0]
    assert streams[0][1] > streams[1][1] > streams[2][1] == 3


def test_the_tail_of_many_shards_is_that_of_the_whole_text(desk):
    for fraction in (0.01, 0.1, 0.3333, 0.5, 0.98):
        other = desk.elsewhere(split="tail", valid_fraction=fraction)
        other.make()
        expected = {"train": [], "valid": []}
        for side, document in split_documents(other.config, Counter()):
            expected[side].append(document.data)
        assert other.texts() == expected


# --- what was done before ---------------------------------------------------------------


def encoded(desk, *arguments, **changes):
    """How many shards a run has made; its result is that of a desk where nothing is kept."""
    before = desk.keys()
    result = desk.make(*arguments, **changes)
    assert result == desk.elsewhere().make(**changes)
    return len(desk.keys() - before)


def test_nothing_is_encoded_twice(desk, capsys):
    assert encoded(desk) == len(cut_into_shards(desk.config))
    capsys.readouterr()
    assert encoded(desk) == 0
    n_shards = len(desk.shards())
    assert f"{n_shards} of {n_shards} shards were already done" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["-first.txt", "050-middle.txt", "~last.txt"])
def test_a_new_file_is_one_new_shard(desk, name):
    encoded(desk)
    shards = desk.files()
    (desk.text / name).write_text("new\n")
    assert encoded(desk) <= 2
    kept = set(map(hash, shards.values())) & set(map(hash, desk.files().values()))
    assert len(kept) >= len(shards) - 2 * 2 - 1
    (desk.text / name).unlink()
    assert encoded(desk) == 0
    assert desk.files() == shards


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".parquet"])
def test_a_file_that_grows_keeps_its_earlier_shards(tmp_path, suffix):
    (tmp_path / "text").mkdir()
    desk = Desk(tmp_path, separator=SEPARATOR)
    texts = [f"text number {i} of them" for i in range(400)]
    write = {".jsonl": as_lines, ".parquet": lambda texts: as_table(texts, dictionary=False),
             ".txt": lambda texts: "".join(f"{t}{SEPARATOR}" for t in texts).encode()}  # fmt: skip
    file = desk.text / f"a{suffix}"
    file.write_bytes(write[suffix](texts[:301]))
    assert encoded(desk) == len(cut_into_shards(desk.config)) > 5
    before = len(cut_into_shards(desk.config))
    file.write_bytes(write[suffix](texts))
    new = len(cut_into_shards(desk.config)) - before
    assert 1 < new <= encoded(desk) <= new + 2


def test_moved_text_is_known_again(desk):
    encoded(desk)
    desk.text.rename(desk.folder / "moved")
    desk.config = replace(desk.config, path=str(desk.folder / "moved"))
    assert encoded(desk) == 0


CHANGES = {
    "code": {"code": "other"},
    "library": {"library": "tokenizers"},
    "fraction": {"valid_fraction": 0.3},
    "split": {"split": "tail"},
    "deduplicate": {"deduplicate": True},
    "skip": {"on_bad_document": "skip"},
    "replace": {"encoding_errors": "replace"},
    "separator": {"separator": "says"},
    "field": {"text_field": "body"},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_nothing_is_reused_after_a_change_of(desk, changes):
    (desk.text / "a.jsonl").write_text('{"text": "text", "body": "other"}\n')
    desk.make()
    changes, settings = dict(changes), {}
    for name in list(changes.keys() & vars(desk.config).keys()):
        settings[name] = changes.pop(name)
    desk.config = replace(desk.config, **settings)
    assert encoded(desk, **changes) == len(cut_into_shards(desk.config))


def test_what_decides_no_bytes_changes_no_key(desk):
    desk.make()
    desk.config = replace(
        desk.config, glob="**/*.txt", sources={"a": SourceConfig(".", "text", 2.0)}
    )
    assert encoded(desk) == 0


def test_nothing_is_reused_with_another_tokenizer_or_end(desk):
    desk.make()
    n_shards = len(cut_into_shards(desk.config))
    train_bpe(["says says Note Note"], 265).save(desk.folder / "tokenizer")
    assert encoded(desk) == n_shards
    tokenizer = load_tokenizer(desk.folder / "tokenizer")
    tokenizer.backend.add_special_tokens(["<other>"])
    tokenizer.save(desk.folder / "tokenizer")
    assert encoded(desk) == n_shards
    type(tokenizer)(tokenizer.backend, "<other>").save(desk.folder / "tokenizer")
    assert encoded(desk) == n_shards
    assert json.loads(desk.files()["tokens.json"])["end_id"] == 265


def test_a_changed_text_changes_its_shard(desk):
    desk.make()
    file = desk.text / "041.txt"
    times = file.stat()
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert encoded(desk) == 1


def damage(file):
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("name", ["train", "valid", "json", "train.fingerprints"])
@pytest.mark.parametrize("how", [damage, Path.unlink, lambda file: os.truncate(file, 3)],
                         ids=["flip", "delete", "cut"])  # fmt: skip
def test_what_is_kept_is_verified(desk, name, how):
    desk.config = replace(desk.config, deduplicate=True)
    expected = desk.make()
    file = sorted(file for file in desk.kept.glob(f"*.{name}") if file.stat().st_size > 3)[0]
    inode = file.with_suffix("").with_suffix(".valid").stat().st_ino
    how(file)
    assert desk.make() == expected
    assert file.with_suffix("").with_suffix(".valid").stat().st_ino != inode or name == "json"


def test_tokens_edited_in_place_do_not_poison_what_is_kept(desk):
    expected = desk.make()
    for file in desk.tokens.glob("*/*.bin"):
        with open(file, "r+b") as stream:
            stream.write(b"\7\7")
    assert desk.make() == expected


def test_equal_shards_are_published_twice(tmp_path):
    (tmp_path / "text").mkdir()
    for name in ("a", "b"):
        (tmp_path / "text" / f"{name}.jsonl").write_bytes(as_lines(map(str, range(300))))
    desk = Desk(tmp_path)
    _, report = desk.make(2)
    assert report["documents"] == 600
    assert len(desk.keys()) < len(cut_into_shards(desk.config))


def test_what_nobody_used_for_a_week_is_dropped(desk):
    expected = desk.make()
    used = desk.keys()
    old = desk.job(code="old")
    encode_all(old, desk.shards(), 1)
    (desk.kept / "abc.xyz.tmp").mkdir()
    (desk.kept / "abc.xyz.tmp" / "train").write_bytes(b"half")
    drop_unused(desk.kept, used)
    assert len(desk.keys()) == 2 * len(used)
    for file in desk.kept.iterdir():
        os.utime(file, (0, 0))
    drop_unused(desk.kept, used)
    assert desk.keys() == used
    assert not list(desk.kept.glob("*.tmp"))
    assert desk.make() == expected


def test_nothing_else_is_left_among_the_tokens(desk):
    expected, _ = desk.make()
    (desk.tokens / "train.bin").write_bytes(b"of an older version")
    (desk.tokens / "train" / "text-99999.bin").write_bytes(b"of more text")
    assert desk.make()[0] == expected


def test_progress_is_told_even_before_the_first_byte(capsys):
    progress = ByteProgress("encoding", 3_000_000, interval_s=0)
    progress.show(0)
    progress.show(1_500_000)
    progress.close()
    assert "encoding 0 of 3 MB" in capsys.readouterr().out


# --- in parts ---------------------------------------------------------------------------


def test_the_parts_together_are_all_tasks_once(desk):
    todo = desk.shards()
    parts = [select_part(todo, f"{i}/4") for i in (1, 2, 3, 4)]
    assert sorted(str(task) for part in parts for task in part) == sorted(map(str, todo))
    for bad in ("0/4", "5/4", "1", "/", "1/", "a/b", "-1/4", "1/4/4", "1.0/4"):
        with pytest.raises(InputError, match=f"--shard {bad}: expected I/N"):
            select_part(todo, bad)


def test_a_part_that_is_missing_is_named(desk):
    job, todo = desk.job(), desk.shards()
    encode_all(job, select_part(todo, "1/2"), 1)
    message = (
        rf"{len(todo) // 2} of {len(todo)} shards are not made yet; the first begins with .*txt"
    )
    with pytest.raises(InputError, match=message):
        require_done(job, todo, 1)
    encode_all(job, select_part(todo, "2/2"), 1)
    require_done(job, todo, 1)


# --- duplicates -------------------------------------------------------------------------


def without_duplicates(config):
    """The documents of each side, each text once: of the training split if it is there."""
    sides = {"train": {}, "valid": {}}
    for side, document in split_documents(config, Counter()):
        sides[side].setdefault(document.data)
    for data in sides["train"]:
        sides["valid"].pop(data, None)
    return {side: list(found) for side, found in sides.items()}


@pytest.mark.parametrize("at_once", [1, 7, 1 << 20])
@pytest.mark.parametrize("split", ["hash", "tail"])
def test_of_equal_documents_one_stays(desk, monkeypatch, split, at_once):
    monkeypatch.setattr("lm.prepare.collect.DOCUMENTS_AT_ONCE", at_once)
    (desk.text / "990.jsonl").write_bytes(as_lines(["same", "same", "Note 5 says 25.\n" * 3]))
    (desk.text / "000.jsonl").write_bytes(as_lines(["same", "other"]))
    other = desk.elsewhere(split=split, deduplicate=True)
    _, report = other.make()
    expected = without_duplicates(other.config)
    assert other.texts() == expected
    n_all = len(list(split_documents(other.config, Counter())))
    assert report["documents"] == sum(map(len, expected.values()))
    assert report["duplicates"] == n_all - report["documents"] > 10
    assert f"Left out: {report['duplicates']} duplicate" in data_table(report)


def test_the_result_is_that_of_a_corpus_without_the_duplicates(desk):
    deduplicated = desk.elsewhere(deduplicate=True)
    deduplicated.make()
    seen = set()
    for file in sorted(desk.text.iterdir()):
        if file.read_bytes() in seen:
            file.unlink()
        else:
            seen.add(file.read_bytes())
    assert len(seen) < 100
    by_hand = desk.elsewhere()
    by_hand.make()
    assert by_hand.streams() == deduplicated.streams()


def test_duplicates_are_found_across_sources(desk):
    half = {name: SourceConfig(f"0[{digits}]*", "text", None)
            for name, digits in (("a", "0-4"), ("b", "3-9"))}  # fmt: skip
    other = desk.elsewhere(deduplicate=True, sources=half)
    _, report = other.make()
    assert report["sources"]["b"]["documents"] + report["sources"]["a"]["documents"] == 90
    assert report["sources"]["a"]["duplicates"] == 5
    assert report["sources"]["b"]["duplicates"] == 20 + 5


# --- what is left out, and the report ---------------------------------------------------


def test_bad_documents_are_left_out_by_request_and_counted(tmp_path):
    (tmp_path / "text").mkdir()
    lines = ['{"text": "good"}', "{", '{"body": 1}', '{"text": " "}', '{"text": "a\\u0000"}',
             '{"text": "\\ud800"}', "[]", '{"text": "fine"}']  # fmt: skip
    (tmp_path / "text" / "a.jsonl").write_text("\n".join(lines))
    table = pyarrow.table({"text": ["good", None]})
    pyarrow.parquet.write_table(table, tmp_path / "text" / "b.parquet")
    desk = Desk(tmp_path, split="tail", valid_fraction=0.5)
    with pytest.raises(InputError, match=r"a.jsonl:2: not valid JSON"):
        desk.make()
    desk = desk.elsewhere(on_bad_document="skip")
    _, report = desk.make()
    assert report["left_out"] == {"empty": 1, "no text": 3, "not JSON": 1, "not UTF-8": 1,
                                  "not text": 1}  # fmt: skip
    assert report["bytes"] == len("goodfinegood")
    assert "Left out: 1 empty, 3 no text, 1 not JSON, 1 not UTF-8, 1 not text\n" in data_table(
        report
    )


def test_whole_files_that_are_no_text_are_left_out_by_request_and_counted_once(tmp_path):
    desk = Desk(tmp_path, on_bad_document="skip", separator="<|>", shard_bytes=1 << 16)
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / "text" / f"{i}.py").write_text(f"print({i})<|>")
    _, before = desk.make()
    long = b"x<|>" * (1 << 16)
    for name, data in (
        ("package.json", b'{\n  "name": "a"\n}\n' + long),  # each longer than a shard
        ("logo.png", b"\x89PNG\r\n\x1a\n" + long),
        ("log.txt", b'{"a": 1}\n' + long),
        ("nested.gz.gz", gzip.compress(gzip.compress(b"a"))),
        ("data.csv", b"id,body\n1,a\n"),
        ("a.ipynb", b"{}"),
    ):
        (tmp_path / "text" / name).write_bytes(data)
    files, report = desk.make()
    assert report["left_out"] == {"no text": 1, "not text": 2, "raw JSON": 3}
    assert report | {"left_out": {}, "sources": 0} == before | {"sources": 0}
    assert desk.make(num_workers=3) == (files, report)


def joined(files, side):
    return b"".join(files[name] for name in sorted(files) if name.startswith(side))


def test_byte_order_marks_are_dropped_and_counted_whatever_the_shards(tmp_path):
    desk = Desk(tmp_path, separator="--")
    (tmp_path / "text").mkdir()
    for i in range(8):
        text = "--".join(f"{i}.{k} {'x' * 90}\ufeff" for k in range(9 if i % 2 else 400))
        (tmp_path / "text" / f"{i}.txt").write_text(text)
    cut, many = desk.make()
    whole, few = desk.elsewhere(shard_bytes=1 << 20).make()
    for file in (tmp_path / "text").iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    for size, before, expected in ((400, cut, many), (1 << 20, whole, few)):
        files, report = desk.elsewhere(shard_bytes=size).make()
        assert report["left_out"] == {"byte-order mark": 8}
        assert report | {"left_out": {}, "sources": 0} == expected | {"sources": 0}
        for side in SPLITS:
            assert joined(files, side) == joined(before, side)
    assert "Left out: 8 byte-order mark\n" in data_table(report)


def test_a_stretch_is_not_taken_for_a_file_of_the_same_bytes(tmp_path):
    desk = Desk(tmp_path, separator="--", valid_fraction=0.5)
    (tmp_path / "text").mkdir()
    file = b"\xef\xbb\xbf" + b"".join(b"%d %s--" % (k, b"x" * 90) for k in range(4))
    (tmp_path / "text" / "a.txt").write_bytes(b"y" * 398 + b"--" + file)  # at a cut
    _, report = desk.make()
    assert report["left_out"] == {}  # the mark is a character within the text
    (tmp_path / "text" / "b.txt").write_bytes(file)
    _, report = desk.make()
    assert report["left_out"] == {"byte-order mark": 1}


def test_the_report_is_what_one_counts_by_hand(tmp_path):
    for name, texts in (("a", ["aa", "bbbb", "cccccc"]), ("b", ["aa", "ab\xe9"])):
        (tmp_path / "text" / name).mkdir(parents=True)
        for i, text in enumerate(texts):
            (tmp_path / "text" / name / f"{i}.txt").write_text(text)
    sources = {name: SourceConfig(name, "text", None) for name in "ab"}
    desk = Desk(tmp_path, split="tail", valid_fraction=0.22, deduplicate=True, sources=sources)
    files, report = desk.make()  # 18 bytes, of which 4 are held out
    a = {"tokens": 12 + 3, "bytes": 12, "documents": 3}
    b = {"tokens": 4 + 1, "bytes": 4, "documents": 1}
    none = dict.fromkeys(a, 0)
    common = {"replacement_characters": 0, "left_out": {}}
    assert report == {
        "vocabulary": 256,
        "tokens": 20,
        "bytes": 16,
        "documents": 4,
        "bytes_per_token": 0.8,
        "longest_document_bytes": 6,
        "vocabulary_used": 5,
        "duplicates": 1,
        **common,
        "train": a,
        "valid": b,
        "sources": {
            "a": {**a, "bytes_per_token": 0.8, "longest_document_bytes": 6, "vocabulary_used": 3,
                  "duplicates": 0, **common, "train": a, "valid": none},
            "b": {**b, "bytes_per_token": 0.8, "longest_document_bytes": 4, "vocabulary_used": 4,
                  "duplicates": 1, **common, "train": none, "valid": b},
        },
    }  # fmt: skip
    assert data_table(report).splitlines()[2:] == [
        "| a | 3 | 12 | 15 | 0.0% | 0.80 | 6 | 1.2% |",
        "| b | 1 | 4 | 5 | 100.0% | 0.80 | 4 | 1.6% |",
        "| all | 4 | 16 | 20 | 25.0% | 0.80 | 6 | 2.0% |",
        "",
        "Left out: 1 duplicate",
        "",
        "No held-out text in a: validation says nothing of it; raise data.valid_fraction or add "
        "text",
    ]
    assert hashlib.sha256(files["train/a-00000.bin"]).hexdigest() in files["tokens.json"].decode()


# --- the stage --------------------------------------------------------------------------


@pytest.fixture
def large(project):
    """A project whose text takes two workers some seconds: 100 shards, without gigatoken."""
    draw = random.Random(0)
    words = [f"{draw.getrandbits(30):x}" for _ in range(3000)]
    with open(project.folder / "text" / "a.jsonl", "w") as file:
        for _ in range(6000):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=120))}) + "\n")
    project.set("data.shard_bytes", 1 << 16)
    project.set("runtime.num_workers", 2)
    project.set("tokenizer.kind", "bytes")
    project.prepare("tokenizer")
    return project


def test_the_stage_says_what_it_read_and_how(project):
    """The same whatever the number of workers, and whether shards are found again."""
    folder = project.folder / "t"
    folder.mkdir()
    for i in range(40):
        line = json.dumps({"text": f"story {i}", "url": "x"})
        (folder / f"c4-{i:02}.json.gz").write_bytes(gzip.compress(f"{line}\n".encode() * 2))
        (folder / f"{i}.JSONL").write_text(line)
    (folder / "a.csv").write_text("id,text\n1,a b c\n")
    (folder / "README.md").write_text("# A data set\n")
    (folder / "odd.a|b").write_text("odd")
    (folder / "none").write_text("none")
    (folder / "a.csv.dvc").write_text("outs: []")
    project.set("tokenizer.kind", "bytes")
    project.set("data.path", "t")
    project.prepare("tokenizer")
    tables = set()
    for workers in (1, 3, 3):
        project.set("runtime.num_workers", workers)
        if workers == 1:
            project.forget_shards()
        result = project.stage("tokens")
        tables.add(project.read("metrics/data.md").decode())
        assert project.read("metrics/data.md").decode() in result.stdout
    (table,) = tables
    assert table.splitlines()[2].startswith("| text | 124 |")
    assert table.splitlines()[4:] == [
        "| source | suffix | files | read as |",
        "|--------|--------|------:|---------|",
        "| text | .json.gz | 40 | JSON lines, field text |",
        "| text | .jsonl | 40 | JSON lines, field text |",
        "| text | .csv | 1 | table, column text |",
        "| text | .md | 1 | text |",
        "| text | none | 1 | text |",
        "| text | other | 1 | text |",
        "",
        "README.md and 2 more read as text beside 40 .json.gz files: exclude by data.glob what "
        "should not be learned",
        "",
        "Files not read: files of DVC's own: 1",
    ]


def tokens_of(project):
    folder = project.folder / "data" / "tokens"
    return {file.name: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def started(project, *arguments):
    """Stage tokens, when it has finished some shards."""
    kept = project.folder / ".dvc" / "tmp" / "lm-shards"
    before = len(list(kept.glob("*.json")))
    process = project.start("python", "-m", "stages.tokens", *arguments)
    while len(list(kept.glob("*.json"))) < before + 4:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    return process, psutil.Process(process.pid).children()


def test_a_run_that_is_struck_goes_on_to_the_same_bytes(large):
    process, workers = started(large)
    process.kill()
    process.communicate()
    assert sys.platform != "linux" or gone(workers)
    assert not tokens_of(large)

    process, (worker, _) = started(large)
    worker.send_signal(signal.SIGKILL)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 3
    assert error.startswith("error: a worker process was killed")
    assert error.count("\n") == 1
    assert "tokens.json" not in tokens_of(large)

    done = large.stage("tokens")
    assert done.returncode == 0, done.stderr
    assert "shards were already done" in done.stdout
    found = tokens_of(large)
    assert len(found) > 90
    large.forget_shards()
    fresh = large.stage("tokens", "runtime.num_workers=1")
    assert "were already done" not in fresh.stdout
    assert tokens_of(large) == found


def test_four_processes_make_the_parts_and_one_collects_them(large):
    stage = ("python", "-m", "stages.tokens")
    alone = large.run(*stage, "--merge")
    assert alone.returncode == 2
    assert "shards are not made yet; the first begins with text/00.txt" in one_line(alone)
    assert not tokens_of(large)
    parts = [large.start(*stage, "--shard", f"{i}/4", "-S", "runtime.num_workers=1")
             for i in (1, 2, 3, 4)]  # fmt: skip
    for part in parts:
        out, error = part.communicate(timeout=300)
        assert part.returncode == 0, error
        assert " shards are done\n" in out
    assert not tokens_of(large)
    merged = large.run(*stage, "--merge")
    assert merged.returncode == 0, merged.stderr
    found = tokens_of(large)
    large.forget_shards()
    large.prepare("tokens")
    assert tokens_of(large) == found


# --- much text --------------------------------------------------------------------------


def write_much(folder, n_bytes):
    """A third as lines, a third as files of all lengths, a third compressed; a million words."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    words = np.array([b"%07x " % i for i in draw.integers(0, 1 << 28, 1_000_000)], "S8")

    def texts(size):
        while size >= 8:
            chosen = words[
                (draw.random(min(size, 1 << draw.integers(9, 22)) // 8) ** 3 * 1e6).astype(int)
            ]
            size -= chosen.nbytes
            yield chosen.tobytes()

    with open(folder / "a.jsonl", "wb") as file:
        for text in texts(n_bytes // 3):
            file.write(b'{"text": "%s"}\n' % text)
    with gzip.open(folder / "b.jsonl.gz", "wb", compresslevel=1) as file:
        for text in texts(n_bytes // 3):
            file.write(b'{"text": "%s"}\n' % text)
    for i, text in enumerate(texts(n_bytes // 3)):
        (folder / f"{i:06}.txt").write_bytes(text)


def peak_bytes(process):
    """The largest sum of the memory of a process and its children; ends with it."""
    peak, family = 0, psutil.Process(process.pid)
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            everyone = [family, *family.children()]
            peak = max(peak, sum(member.memory_info().rss for member in everyone))
        time.sleep(0.05)
    return peak


@pytest.mark.soak
def test_memory_does_not_grow_with_the_text(project):
    """Needs 10 GB of disk; LM_SOAK_BYTES=1000000000 makes the larger text smaller."""
    project.set("tokenizer.vocab_size", 1024)
    project.set("tokenizer.sample_bytes", 1 << 20)
    project.set("runtime.num_workers", 2)
    peaks = []
    for size in (200_000_000, int(os.environ.get("LM_SOAK_BYTES", "4000000000"))):
        write_much(project.folder / str(size), size)
        project.set("data.path", str(size))
        if not peaks:
            project.prepare("tokenizer")
        start = time.monotonic()
        process = project.start("python", "-m", "stages.tokens")
        peaks.append(peak_bytes(process))
        out, error = process.communicate()
        assert process.returncode == 0, error
        assert json.loads(project.read("metrics/data.json"))["bytes"] > 0.9 * size
        print(f"{size:,} bytes: {peaks[-1] >> 20} MiB, {time.monotonic() - start:.0f} s\n{out}")
    assert peaks[1] < 800 << 20
    assert peaks[1] < peaks[0] + (150 << 20)
