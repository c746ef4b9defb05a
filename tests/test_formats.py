"""Files to records: every record once, in any stretches, and what is damaged is an error."""

import csv
import gzip
import io
import json
import random
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import accumulate

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from lm.base.errors import InputError
from lm.prepare.file_bytes import split_at
from lm.prepare.limits import MAX_DOCUMENT_BYTES
from lm.prepare.readers import reader_of
from lm.prepare.readers.json_lines import JsonLines
from lm.prepare.readers.parquet import Parquet
from lm.prepare.readers.text import Text
from lm.prepare.records import NAME_ANOTHER, SKIP, Bad, Dropped, Found, ReadOptions
from lm.prepare.signatures import MARK
from tests.project import ROOT

ONE_FILE_ONE_RECORD = ReadOptions("text", None, replace=False, max_expansion=100)
TEXTS = ["first", "sec\nond", "", "drei \U0001f600", "x" * 5000, "last"]


def parted(separator):
    return ReadOptions("text", separator, replace=False, max_expansion=100)


@contextmanager
def in_pieces(**sizes):
    """Read this number of bytes at a time: CHUNK_BYTES, SEARCH_BYTES, MAX_DOCUMENT_BYTES."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in sizes.items():
            patch.setattr(f"lm.prepare.limits.{name}", size)
        yield patch


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Where the examples of one test are written one after the other."""
    return tmp_path_factory.mktemp("formats") / "a.txt"


# --- lines and parts --------------------------------------------------------------------

SEPARATORS = st.sampled_from([b"\n", b"\n\n", b"aba", b"ab", b"aa", b"abaab", b"aaa"])
LETTERS = st.text("ab\n", max_size=60).map(str.encode)


@given(st.text("ab", max_size=60), st.text("ab", min_size=1, max_size=4), st.integers(1, 9))
def test_records_are_the_parts_of_the_whole_for_any_chunk(text, separator, chunk):
    with in_pieces(CHUNK_BYTES=chunk):
        found = list(split_at(io.BytesIO(text.encode()), separator.encode(), 0, None))
    parts = text.split(separator)
    if parts[-1] == "":
        parts.pop()  # nothing follows the last separator
    assert [data.decode() for _, data in found] == parts
    assert all(text.startswith(data.decode(), offset) for offset, data in found)


def assert_stretches_are_the_whole(reader, size):
    starts = reader.starts(size)
    stretches = list(zip(starts, [*starts[1:], None], strict=True))
    whole = list(reader.read())
    assert [r for piece in stretches for r in reader.read(*piece)] == whole
    content = b"".join(b"".join(reader.content(*piece)) for piece in stretches)
    assert starts[0] == 0
    assert starts == sorted(set(starts))
    return whole, content, starts


@given(LETTERS, SEPARATORS, st.integers(1, 20), st.integers(1, 9), st.integers(1, 9))
@example(b"aaab", b"aa", 3, 9, 9)  # the second "aa" is none
@example(b"a\n\n\nb\n\nab", b"\n\n", 4, 9, 2)
def test_stretches_of_any_size_together_are_the_whole_file(
    file, data, separator, size, chunk, search
):
    """Separators that overlap themselves included: where they are cut depends on the beginning."""
    file.write_bytes(data)
    with in_pieces(CHUNK_BYTES=chunk, SEARCH_BYTES=search):
        whole, content, _ = assert_stretches_are_the_whole(Text(file, parted(separator)), size)
    assert content == data
    parts = [part.strip(b"\r\n") for part in data.split(separator)]
    assert [r.data for r in whole] == (parts if data.split(separator)[-1] else parts[:-1])


LINES = st.sampled_from([b'{"text": "a"}', b"", b" ", b'{"text": "\\ud800"}', b"[", b'{"text":""}'])


@given(st.lists(LINES, max_size=20), st.sampled_from([b"", b"\n"]), st.integers(1, 60))
def test_stretches_of_lines_together_are_the_whole_file(file, lines, end, size):
    data = b"\n".join(lines) + end
    file.write_bytes(data)
    whole, content, _ = assert_stretches_are_the_whole(JsonLines(file, parted(None)), size)
    assert content == data
    assert len(whole) == sum(bool(line.strip()) for line in lines)


@given(st.lists(st.integers(0, 60), max_size=8), st.integers(1, 30), st.integers(3, 20))
def test_a_record_that_is_too_long_is_bad_once_and_the_next_is_right(lengths, chunk, limit):
    data = b"<|>".join(b"x" * length for length in lengths)
    with in_pieces(CHUNK_BYTES=chunk, MAX_DOCUMENT_BYTES=limit):
        found = list(split_at(io.BytesIO(data), b"<|>", 0, None))
    if lengths and lengths[-1] == 0:
        lengths = lengths[:-1]
    expected = [b"x" * length if length <= limit else None for length in lengths]
    assert [data for _, data in found] == expected
    assert [offset for offset, _ in found] == list(
        accumulate((length + 3 for length in lengths), initial=0)
    )[: len(found)]


def test_a_file_without_separators_is_searched_once(tmp_path):
    """Sought from every multiple of the stretch it would be read a thousand times over."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x" * (1 << 20) + b"\n{}\n")
    n_read = 0

    class Counting(io.BytesIO):
        def read(self, size=-1):
            nonlocal n_read
            data = super().read(size)
            n_read += len(data)
            return data

    with in_pieces(SEARCH_BYTES=1 << 12) as patch:
        patch.setattr("builtins.open", lambda file, mode: Counting(file.read_bytes()))
        starts = JsonLines(path, parted(None)).starts(1 << 10)
    assert starts == [0, (1 << 20) + 1]
    assert n_read < 2 << 20


def test_records_are_named_by_their_number(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one--two--\xff--four")
    options = parted(b"--")
    found = list(Text(path, options).read())
    assert [Text(path, options).name(r.offset) for r in found] == [
        f"{path}#{i}" for i in range(1, 5)
    ]
    assert found[2] == Bad(10, "not UTF-8", found[2].message)
    assert found[3] == Found(13, b"four")


# --- one text in every format -----------------------------------------------------------


def as_lines(texts):
    return "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)).encode()


def as_table(texts, kind=None, row_group_size=2, **options):
    kind = kind or pyarrow.string()
    column = pyarrow.array(texts, pyarrow.string()).cast(kind)
    table = pyarrow.table({"id": range(len(texts)), "text": column})
    made = io.BytesIO()
    pyarrow.parquet.write_table(table, made, row_group_size=row_group_size, **options)
    return made.getvalue()


def two_frames(compress, data):
    """As `cat a.gz b.gz` gives them."""
    return compress(data[:7]) + compress(data[7:])


def as_rows(texts, delimiter=","):
    made = io.StringIO()
    csv.writer(made, delimiter=delimiter).writerows([("text", "id"), *((t, 0) for t in texts)])
    return made.getvalue().encode()


PLAINLY = {".txt": lambda texts: "<|end|>".join(texts).encode(), ".jsonl": as_lines,
           ".json": as_lines, ".ndjson": as_lines, ".Parquet": as_table, ".csv": as_rows,
           ".tsv": partial(as_rows, delimiter="\t")}  # fmt: skip
PACKED = {
    "": lambda data: data,
    ".gz": lambda data: two_frames(gzip.compress, data),
    ".ZST": lambda data: two_frames(zstandard.compress, data),
}


def records_of(path, size=1 << 20):
    found, _, _ = assert_stretches_are_the_whole(reader_of(path, parted(b"<|end|>")), size)
    return found


def texts_of(path, size=1 << 20):
    return [record.data.decode() for record in records_of(path, size)]


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("kind", PLAINLY)
def test_every_format_gives_the_same_texts(tmp_path, kind, packed):
    path = tmp_path / f"a.b{kind}{packed}"
    path.write_bytes(PACKED[packed](PLAINLY[kind](TEXTS)))
    for size in (1, 10, 1 << 20):
        assert texts_of(path, size=size) == TEXTS


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_is_dropped_at_the_beginning_of_a_file_alone(tmp_path, kind, packed):
    path = tmp_path / f"a{kind}{packed}"
    texts = ["first", "\ufeffsecond", "th\ufeffird"]
    data = PLAINLY[kind](texts)
    path.write_bytes(PACKED[packed](MARK + data))
    for size in (1, 10, 1 << 20):
        mark, *found = records_of(path, size)
        assert mark == Dropped("byte-order mark")
        assert [record.data.decode() for record in found] == texts


def test_offsets_behind_a_byte_order_mark_are_those_of_the_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(MARK + b"a--b\xff--c")
    _, first, bad, last = Text(path, parted(b"--")).read()
    assert (first.offset, bad.offset, last.offset) == (3, 6, 10)
    assert "byte 0xff at offset 7 " in bad.message
    assert Text(path, parted(b"--")).name(bad.offset) == f"{path}#2"
    path.write_bytes(MARK + b"a\xff")
    _, bad = Text(path, ONE_FILE_ONE_RECORD).read()
    assert "byte 0xff at offset 4 " in bad.message


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "{",
        "[1]",
        "{a}\n",
        '{"u}ber dem Flu\\ss',
        '{"a": 1} is JSON\n',
        '{\n  "a": 1\n}\n',
        '{"text" => "a"}\n{"text" => "b"}',
    ],
)
def test_a_text_that_begins_like_json_is_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert [*Text(tmp_path / "a.txt", ONE_FILE_ONE_RECORD).read()] == [Found(0, text.encode())]


def test_columns_are_found_by_name_whatever_else_a_row_holds(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('id,"text"\r\n\r\n1,"a ""b"",\r\nc"\r\n2,d\n3,\r\n')
    assert [*reader_of(path, ONE_FILE_ONE_RECORD).read()] == [
        Found(3, b'a "b",\r\nc'), Found(5, b"d"), Found(6, b""),
    ]  # fmt: skip
    path.write_text("")
    [bad] = reader_of(path, ONE_FILE_ONE_RECORD).read()
    assert bad.message == f"no column 'text' (has: ); {NAME_ANOTHER}"


def test_a_row_but_not_a_table_has_at_most_the_length_of_a_document(tmp_path):
    path, limit = tmp_path / "a.csv", csv.field_size_limit()
    try:
        with in_pieces(MAX_DOCUMENT_BYTES=100):
            path.write_text("text\n" + "x" * 99 + "\n" + "y\n" * 100)
            assert len([*reader_of(path, ONE_FILE_ONE_RECORD).read()]) == 101
            path.write_text("text\n" + "y\n" * 100 + "x" * 101)
            with pytest.raises(InputError, match=r"a.csv:102: not a row of a table \(a row longer"):
                [*reader_of(path, ONE_FILE_ONE_RECORD).read()]
    finally:
        csv.field_size_limit(limit)


def test_a_file_that_expands_as_far_as_is_said_is_read(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"x" * 10_000))
    with in_pieces(MAX_DOCUMENT_BYTES=1000):
        for limit, found in ((300, "too long"), (100, None)):
            options = replace(parted(b"-"), max_expansion=limit)
            if found:
                assert [bad.reason for bad in Text(path, options).read()] == [found]
            else:
                with pytest.raises(InputError, match=r"expand to more than 100 times as many"):
                    list(Text(path, options).read())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (pyarrow.string(), {"use_dictionary": False, "compression": "zstd"}),
        (pyarrow.string(), {"data_page_version": "2.0", "write_page_index": True}),
        (pyarrow.large_string(), {"compression": "gzip", "data_page_size": 10}),
        (pyarrow.string_view(), {}),
        (pyarrow.binary(), {"store_schema": False}),
        (pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), {}),
        (pyarrow.dictionary(pyarrow.int8(), pyarrow.large_string()), {"row_group_size": 4}),
    ],
    ids=str,
)
def test_every_kind_of_text_column_gives_the_same_texts(tmp_path, kind, options):
    path = tmp_path / "a.parquet"
    path.write_bytes(as_table(TEXTS, kind, **options))
    for size in (1, 100, 1 << 20):
        assert texts_of(path, size=size) == TEXTS


def test_tables_are_cut_at_row_groups(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(as_table(["text " * 100 + str(i) for i in range(100)], row_group_size=5))
    starts = Parquet(path, parted(None)).starts(10_000)
    assert 2 < len(starts) < 10
    assert max(starts) < 20
    assert len(Parquet(path, parted(None)).starts(1)) == 20


def test_an_empty_table_has_no_rows(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(as_table([]))
    assert texts_of(path) == []
    path.write_bytes(as_table(["", None]))
    found = list(Parquet(path, parted(None)).read())
    null = f"column 'text' is null; remove the row {SKIP}"
    assert found == [Found(0, b""), Bad(1, "no text", null)]


def test_the_content_of_a_table_tells_texts_apart_and_not_their_neighbours(tmp_path):
    """What a shard is known by: other text is other content, another id column is not."""

    def content(texts, ids, **piece):
        table = pyarrow.table({"text": texts, "id": ids})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
        return b"".join(Parquet(tmp_path / "a.parquet", parted(None)).content(**piece))

    before = content(["a", "b", "c"], [1, 2, 3])
    assert content(["a", "b", "c"], [1, 2, 4000]) == before
    assert content(["a", "b", "d"], [1, 2, 3]) != before
    assert content(["a", "b", None], [1, 2, 3]) != before
    assert content(["a", "b", "c"], [1, 2, 3], stop=1) == content(["a", "b"], [1, 2])


@pytest.mark.parametrize("kind", [".gz", ".zst"])
def test_a_compressed_file_that_is_cut_off_or_altered_is_an_error(tmp_path, kind):
    data = random.Random(0).randbytes(20_000).hex().encode()
    packed = {
        ".gz": gzip.compress(data),
        ".zst": zstandard.ZstdCompressor(write_checksum=True).compress(data),
    }[kind]
    path = tmp_path / f"a.txt{kind}"
    for damaged in (
        packed[:-1],
        packed[: len(packed) // 2],
        packed[:10_000] + bytes([packed[10_000] ^ 1]) + packed[10_001:],
        packed + b"garbage",
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"a.txt.*: damaged or cut off \("):
            list(Text(path, ONE_FILE_ONE_RECORD).read())


def test_a_damaged_table_is_an_error_or_other_text(tmp_path):
    """Parquet has no checksums of its own by default; nothing but InputError may come of it."""
    path = tmp_path / "a.parquet"
    whole = as_table(TEXTS, compression="none")
    draw, refused = random.Random(0), 0
    damaged = [whole[:size] for size in range(0, len(whole), 97)]
    for _ in range(100):
        at = draw.randrange(len(whole))
        damaged.append(whole[:at] + draw.randbytes(1) + whole[at + 1 :])
    for data in damaged:
        path.write_bytes(data)
        with suppress(InputError):
            starts = Parquet(path, parted(None)).starts(100)
            list(Parquet(path, parted(None)).read())
            b"".join(Parquet(path, parted(None)).content(starts[-1]))
            refused -= 1
        refused += 1
    assert refused > len(whole) // 97


def test_rows_of_long_texts_are_not_all_held_at_once(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [str(i) * (1 << 20) for i in range(10)] * 6
    pages = {"use_dictionary": False, "data_page_size": 1, "write_batch_size": 1}
    path.write_bytes(as_table(texts, row_group_size=60, **pages))
    pool = pyarrow.default_memory_pool()
    before, held = pool.bytes_allocated(), 0
    for i, record in enumerate(Parquet(path, parted(None)).read()):
        assert record.data.decode() == texts[i]
        held = max(held, pool.bytes_allocated() - before)
    assert i == 59
    assert held < 45 << 20


def test_what_is_no_utf8_is_replaced_on_request_and_counted(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": pyarrow.array([b"a\xff\0", b"b"], pyarrow.binary())})
    pyarrow.parquet.write_table(table, path)
    bad, _ = Parquet(path, parted(None)).read()
    assert bad.reason == "not UTF-8"
    assert "byte 0xff at offset 1 of the text" in bad.message
    found, _ = Parquet(path, ReadOptions("text", None, replace=True, max_expansion=100)).read()
    assert found == Found(0, "a\ufffd\ufffd".encode(), 2)


def test_no_document_is_longer_than_the_encoder_takes():
    assert MAX_DOCUMENT_BYTES < 1 << 31  # its size is kept in 32 bits


NEW_FORMAT = """
from lm.prepare.readers.text import Text

class Loud(Text):
    description = "loud text"

READERS = {"SUFFIX": Loud}
"""


@pytest.mark.parametrize("suffix", [".loud", ".csv"])
def test_a_new_format_is_one_new_file_and_no_suffix_has_two(tmp_path, suffix):
    shutil.copytree(ROOT / "lm", tmp_path / "lm", ignore=shutil.ignore_patterns("__pycache__"))
    new = tmp_path / "lm" / "prepare" / "readers" / "loud.py"
    new.write_text(NEW_FORMAT.replace("SUFFIX", suffix))
    program = (
        "from pathlib import Path; from lm.prepare.readers import reader_of;"
        "print(reader_of(Path('a.loud.gz'), None).description)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == ("loud text\n" if suffix == ".loud" else "")
    assert ("AssertionError" in done.stderr) == (suffix == ".csv")
