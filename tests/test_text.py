"""Files to documents to splits: nothing altered, nothing dropped in silence."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from dvc.repo import Repo
from hypothesis import given
from hypothesis import strategies as st

from lm.base.errors import EnvironmentFault, InputError
from lm.base.params import load_params
from lm.base.sections import read_section
from lm.corpus.packages import license_of, python_sources
from lm.prepare.documents import (
    assign_splits,
    cut_into_shards,
    read_documents,
    split_documents,
)
from lm.prepare.listing import write_listing
from lm.prepare.sources import (
    DataConfig,
    SourceConfig,
    find_files,
    find_sources,
    in_words,
    weights,
)
from tests.project import ROOT, SMOKE

CHARACTERS = st.characters(codec="utf-8", exclude_characters="\0")


@pytest.fixture
def folder(tmp_path, data_config):
    """A text folder and the settings that read it."""
    return tmp_path, replace(data_config, path=str(tmp_path))


def texts(config):
    return [document.text for document in read_documents(config, Counter())]


def test_a_folder_is_read_in_the_order_of_its_paths(folder):
    path, config = folder
    for name in ("b.txt", "a/z.md", "a/b.py", ".hidden/x.txt", ".secret"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(name)
    assert texts(config) == ["a/b.py", "a/z.md", "b.txt"]
    assert texts(replace(config, glob="**/*.md")) == ["a/z.md"]
    assert texts(replace(config, path=str(path / "b.txt"))) == ["b.txt"]


@pytest.mark.parametrize("setting", ["encoding_errors", "on_bad_document", "split"])
def test_a_third_value_is_an_error_and_not_taken_for_the_second(folder, setting):
    path, config = folder
    (path / "a.txt").write_text("text")
    object.__setattr__(config, setting, "third")
    with pytest.raises((AssertionError, KeyError), match="third"):
        list(split_documents(config, Counter()))


def test_bytes_of_a_text_stay_as_they_are(folder):
    path, config = folder
    data = "a\r\nb\rc\n\u2028é\U0001f600\ufeff end\n".encode()
    (path / "a.txt").write_bytes(data)
    assert [text.encode() for text in texts(config)] == [data]


def test_documents_are_cut_at_the_separator_across_chunks(folder, monkeypatch):
    path, config = folder
    (path / "a.txt").write_text("one\n<|endoftext|>\ntwo\n\nstill two<|endoftext|>three\n")
    config = replace(config, separator="<|endoftext|>")
    for chunk in (1, 5, 1 << 20):
        monkeypatch.setattr("lm.prepare.limits.CHUNK_BYTES", chunk)
        assert texts(config) == ["one", "two\n\nstill two", "three"]


@pytest.mark.parametrize("separator", [None, "<|end|>"])
def test_a_document_is_as_long_as_allowed_and_no_longer(folder, monkeypatch, separator):
    path, config = folder
    monkeypatch.setattr("lm.prepare.limits.MAX_DOCUMENT_BYTES", 100)
    monkeypatch.setattr("lm.prepare.limits.CHUNK_BYTES", 30)
    config = replace(config, separator=separator)
    (path / "a.txt").write_text("x" * 100 + (separator or ""))
    assert texts(config) == ["x" * 100]
    (path / "a.txt").write_text("x" * 101 + (separator or ""))
    with pytest.raises(InputError, match=r"a.txt(#1)?: a document longer than"):
        texts(config)
    (path / "a.txt").unlink()
    line = json.dumps({"text": "x" * 88})
    (path / "a.jsonl").write_text(f"{line}\n{line}\n")  # 100 bytes each
    assert len(texts(config)) == 2
    (path / "a.jsonl").write_text(f"{line}\n {line}\n")
    with pytest.raises(InputError, match=r"a.jsonl:2: a document longer than"):
        texts(config)


@pytest.mark.parametrize("name", ["b.txt", "b.txt.gz"])
def test_a_separator_that_stands_in_one_file_is_enough(folder, monkeypatch, name):
    path, config = folder
    monkeypatch.setattr("lm.prepare.limits.CHUNK_BYTES", 3)
    config = replace(config, separator="-<|>-")
    (path / "a.txt").write_text("--<|>\n-")
    (path / "c.jsonl").write_text('{"text": "-<|>-"}\n')
    with pytest.raises(InputError, match=r'"-<\|>-": does not occur in any text file'):
        cut_into_shards(config)
    pack = gzip.compress if name.endswith(".gz") else bytes
    (path / name).write_bytes(pack(b"--<|>-"))
    assert texts(config) == ["--<|>\n-", "-", "-<|>-"]
    (path / "a.txt").unlink()
    (path / name).unlink()
    assert texts(config) == ["-<|>-"]  # a separator cuts plain text alone


def test_links_to_files_are_followed(folder):
    path, config = folder
    (path / ".cache").mkdir()
    (path / ".cache" / "0a").write_text("linked")
    (path / "a.txt").symlink_to(path / ".cache" / "0a")
    assert texts(config) == ["linked"]


def test_jsonl_gives_the_named_field_and_the_line(folder):
    path, config = folder
    lines = [{"body": "first", "id": 1}, {"body": "sec\nond \ud83d\ude00"}]
    (path / "a.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    got = list(read_documents(replace(config, text_field="body"), Counter()))
    assert [(str(document.place), document.text) for document in got] == [
        (f"{path}/a.jsonl:1", "first"),
        (f"{path}/a.jsonl:3", "sec\nond \U0001f600"),
    ]


def test_empty_documents_are_counted(folder):
    path, config = folder
    (path / "a.txt").write_text("text")
    (path / "b.txt").write_text(" \n\t")
    (path / "c.txt").write_text("")
    tally = Counter()
    assert len(list(read_documents(config, tally))) == 1
    assert tally == {"empty": 2}


def test_replaced_bytes_are_counted_on_request(folder):
    path, config = folder
    (path / "a.txt").write_bytes(b"good \xff\xfe bad \xef\xbf\xbd \xe2\x82")
    (path / "b.jsonl").write_text('{"text": "half \\ud800 pair"}\n')
    (path / "c.txt").write_bytes(b"zero \0")
    tally = Counter()
    config = replace(config, encoding_errors="replace")
    got = [document.text for document in read_documents(config, tally)]
    assert got == [
        "good \ufffd\ufffd bad \ufffd \ufffd",
        "half \ufffd\ufffd\ufffd pair",
        "zero \ufffd",
    ]
    assert tally == {"replacement characters": 7}


@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_offsets_of_bad_bytes_count_from_the_start_of_the_file(folder, monkeypatch, chunk):
    path, config = folder
    monkeypatch.setattr("lm.prepare.limits.CHUNK_BYTES", chunk)
    (path / "a.txt").write_bytes("é".encode() * 500 + b"<|end|>ab\xff")
    with pytest.raises(InputError, match=r"a.txt#2: byte 0xff at offset 1009 is not UTF-8"):
        texts(replace(config, separator="<|end|>"))
    (path / "a.txt").unlink()
    (path / "a.jsonl").write_bytes(b'{"text": "first"}\n{"text": "\xff"}\n')
    with pytest.raises(InputError, match=r"a.jsonl:2: byte 0xff at offset 28 is not UTF-8"):
        texts(config)


@pytest.mark.parametrize("glob", ["", "/etc/*"])
def test_an_impossible_pattern_is_refused(folder, glob):
    _, config = folder
    with pytest.raises(InputError, match="data.glob = "):
        texts(replace(config, glob=glob))


def test_missing_sources_are_named(folder):
    path, config = folder
    with pytest.raises(InputError, match=r"no file matches data.glob = \*\*/\*"):
        find_files(config)
    with pytest.raises(InputError, match="no such file or folder$"):
        find_files(replace(config, path=str(path / "missing")))
    with pytest.raises(InputError, match=r"no such file or folder; a pattern goes into data.glob"):
        find_files(replace(config, path=str(path / "*.txt")))


def splits(config):
    return {document.text: side for side, document in split_documents(config, Counter())}


def test_hash_split_is_stable_when_documents_come_and_go(folder):
    path, config = folder
    config = replace(config, valid_fraction=0.25)
    for i in range(400):
        (path / f"{i:03}.txt").write_text(f"document {i}")
    before = splits(config)
    share = list(before.values()).count("valid") / 400
    assert share == pytest.approx(0.25, abs=0.07)
    for i in range(0, 400, 3):
        (path / f"{i:03}.txt").unlink()
    for i in range(50):
        (path / f"-new-{i}.txt").write_text(f"new {i}")
    after = splits(config)
    assert all(before[text] == split for text, split in after.items() if text in before)


def test_exact_duplicates_stay_on_one_side(folder):
    path, config = folder
    for i in range(40):
        (path / f"{i}.txt").write_text(f"text {i % 4}")
    found = {}
    for side, document in split_documents(replace(config, valid_fraction=0.5), Counter()):
        found.setdefault(document.text, set()).add(side)
    assert all(len(side) == 1 for side in found.values())


def test_tail_split_takes_the_last_bytes_at_a_line_break(folder):
    path, config = folder
    lines = [f"line {i:03}\n" for i in range(100)]
    (path / "a.txt").write_text("".join(lines[:70]))
    (path / "b.txt").write_text("".join(lines[70:]))
    got = list(split_documents(replace(config, split="tail", valid_fraction=0.1), Counter()))
    train = "".join(document.text for split, document in got if split == "train")
    valid = "".join(document.text for split, document in got if split == "valid")
    assert train + valid == "".join(lines)
    assert len(valid) == pytest.approx(0.1 * len(train + valid), abs=len(lines[0]))
    assert train.endswith("\n")


@pytest.mark.parametrize(("fraction", "empty"), [(0.999999, "train"), (0.000001, "valid")])
def test_a_split_without_documents_is_refused(folder, fraction, empty):
    path, config = folder
    (path / "a.txt").write_text("the only file")
    with pytest.raises(InputError, match=f"the {empty} split has no documents.*data.split: tail"):
        list(split_documents(replace(config, valid_fraction=fraction), Counter()))


@given(st.text(CHARACTERS, min_size=1).filter(str.strip), st.floats(0.01, 0.99))
def test_tail_split_loses_no_character(tmp_path_factory, text, fraction):
    file = tmp_path_factory.mktemp("tail") / "a.txt"
    file.write_bytes(text.encode())
    config = read_section(DataConfig, load_params(SMOKE), "data")
    config = replace(config, path=str(file), split="tail", valid_fraction=fraction)
    boundary = int(len(text.encode()) * (1 - fraction))
    got = list(assign_splits(read_documents(config, Counter()), config, boundary))
    assert "".join(document.text for _, document in got) == text
    assert [side for side, _ in got] in (["train"], ["valid"], ["train", "valid"])


@pytest.fixture
def library(folder):
    """A folder with a shelf of books and two of web pages, and what reads each its own way."""
    path, config = folder
    for name, text in (("books/a.txt", "a"), ("books/b.md", "b"), ("web/1/c.txt", "c")):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(f"text of {text}")
    (path / "web" / "d.jsonl").write_text('{"body": "text of d"}\n')
    return path, replace(
        config,
        sources={
            "web": SourceConfig("web", "body", 2.0),
            "books": SourceConfig("books/*.txt", "text", 1.0),
        },
    )


def test_sources_are_read_in_the_order_of_the_settings_each_its_own_way(library):
    path, config = library
    assert texts(config) == ["text of c", "text of d", "text of a"]
    assert [source.name for source in find_sources(config)] == ["web", "books"]
    assert weights(config) == {"web": 2.0, "books": 1.0}
    assert [shard.source for shard in cut_into_shards(config)] == ["web", "books"]
    assert find_files(replace(config, glob="**/*.txt")) == [
        path / "web/1/c.txt",
        path / "books/a.txt",
    ]


def test_a_source_may_be_one_file(library):
    _, config = library
    config = replace(config, sources={"one": SourceConfig("web/1/c.txt", "text", None)})
    assert texts(config) == ["text of c"]


def test_every_document_is_in_one_shard_of_the_plan_and_in_order(folder):
    path, config = folder
    for i in range(300):
        (path / f"{i:03}.txt").write_text(f"document {i} " * (i % 7 + 1))
    (path / "100x.jsonl").write_text("".join(f'{{"text": "line {i}"}}\n' for i in range(300)))
    (path / "200x.jsonl").write_text("")
    expected = texts(config)
    for size in (50, 500, 5_000, 1 << 20):
        config = replace(config, shard_bytes=size)
        shards = cut_into_shards(config)
        found = [[d.text for d in read_documents(config, Counter(), [shard])] for shard in shards]
        assert [text for shard in found for text in shard] == expected
        assert sum(shard.size_bytes for shard in shards) == pytest.approx(
            sum(file.stat().st_size for file in find_files(config)), abs=len(shards)
        )
    assert len(shards) == 1


def test_a_file_that_comes_or_goes_changes_its_own_shard_alone(folder):
    path, config = folder
    config = replace(config, shard_bytes=1000)
    for i in range(0, 400, 2):
        (path / f"{i:03}.txt").write_text(f"document {i} " * 8)

    def shards():
        return {
            tuple(stretch.file.name for stretch in shard.stretches)
            for shard in cut_into_shards(config)
        }

    before = shards()
    assert 10 < len(before) < 40
    for i in (1, 201, 399):
        (path / f"{i:03}.txt").write_text(f"document {i} " * 8)
        assert len(before - shards()) == 1
        (path / f"{i:03}.txt").unlink()
    assert shards() == before


def test_a_file_whose_name_is_not_utf_8_is_named_or_read_by_a_listing(folder, tmp_path_factory):
    path, config = folder
    try:
        (path / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    except OSError:
        pytest.skip("this file system has names of text alone")
    with pytest.raises(InputError, match=r"/caf\\xe9.txt: a name that is not UTF-8"):
        find_sources(config)
    (path / os.fsdecode(b"caf\xe9.txt.gz")).write_bytes(gzip.compress(b"packed"))
    table = pyarrow.table({"text": ["row"]})
    with open(path / os.fsdecode(b"caf\xe9.parquet"), "wb") as file:
        pyarrow.parquet.write_table(table, file)
    listing = tmp_path_factory.mktemp("listing") / "a.listing"
    assert write_listing(path, listing) == 3
    config = replace(config, path=str(listing))
    assert texts(config) == ["row", "text", "packed"]
    assert len(cut_into_shards(config)) == 1


def hide_folder(path):
    (path / ".dvcignore").write_text("# drafts\nt/drafts\n")


def hide_by_pattern(path):
    (path / ".dvcignore").write_text("*.md\n!keep.md\n")


def hide_from_within(path):
    (path / "t" / ".dvcignore").write_text("drafts\n*.md")


def hide_elsewhere(path):
    (path / ".dvcignore").write_text("/s/\n/other/**/*.md\n/drafts/\n")


def nested_project(path):
    (path / "t/s/drafts/.dvc").mkdir()


def nested_above(path):
    (path / "t/.dvc").mkdir()


@pytest.mark.parametrize("root", ["t/s", "t"])
@pytest.mark.parametrize(
    "hide",
    [hide_folder, hide_by_pattern, hide_from_within, hide_elsewhere, nested_project, nested_above],
)
def test_what_is_read_is_what_dvc_watches(tmp_path, data_config, monkeypatch, hide, root):
    Repo.init(str(tmp_path), no_scm=True).close()
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.md", "keep.md", "drafts/c.txt", "drafts/d.md"):
        (tmp_path / "t/s" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "t/s" / name).write_text(name)
    (tmp_path / "t/drafts").mkdir()
    (tmp_path / "t/drafts/e.txt").write_text("e")
    hide(tmp_path)
    with Repo(str(tmp_path)) as repo:
        watched = sorted(repo.dvcignore.find(repo.fs, str(tmp_path / root)))
    config = replace(data_config, path=root)
    if not watched or (hide is hide_from_within and root == "t"):  # which DVC refuses, too
        with pytest.raises(InputError, match=r"not read|DVC allows none in a folder"):
            find_sources(config)
        return
    found, *_ = find_sources(config)
    assert [str(tmp_path / file) for file in found.files] == watched
    hides_here = hide is not hide_elsewhere and (root, hide) != ("t/s", hide_folder)
    assert (sum(found.left_out.values()) > 0) is hides_here
    # elsewhere DVC hides nothing
    monkeypatch.chdir(tmp_path / "t/drafts")
    if hide is not hide_from_within and hide is not nested_above:
        assert len(texts(replace(config, path=str(tmp_path / "t/s")))) == 5


def test_dvc_is_not_asked_where_the_project_hides_nothing_of_the_text(tmp_path):
    """Importing it takes a second, and each of its answers is kept in memory."""
    shutil.copy(ROOT / ".dvcignore", tmp_path)
    (tmp_path / "t").mkdir()
    (tmp_path / "t/a.txt").write_text("a")
    program = (
        "import sys; from collections import Counter; from pathlib import Path\n"
        "from lm.prepare.listing import watched\n"
        "print([e.name for e in watched(Path('t'), Counter())], 'dvc' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("['a.txt'] False\n", "")


def test_text_beside_a_linked_output_is_refused(tmp_path, data_config, monkeypatch):
    (tmp_path / "project").mkdir()
    (tmp_path / "disk/models").mkdir(parents=True)
    (tmp_path / "project/models").symlink_to("../disk/models")
    monkeypatch.chdir(tmp_path / "project")
    with pytest.raises(InputError, match=r"/disk: the stages write models; put your text"):
        find_sources(replace(data_config, path=str(tmp_path / "disk")))


def test_dvcs_own_files_are_left_out_and_counted(folder):
    path, config = folder
    for name in ("a.txt", "a.txt.dvc", "dvc.yaml", "b/dvc.lock", "b/not-dvc.yaml"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(name)
    assert texts(config) == ["a.txt", "b/not-dvc.yaml"]
    assert in_words(find_sources(config)[0].left_out) == "files of DVC's own: 3"


def test_links_to_the_same_file_count_once(folder):
    path, config = folder
    for name in ("b.txt", ".cache/outside", ".dvc/cache/files/md5/aa/bb"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(name)
    (path / "a.txt").symlink_to("b.txt")  # comes first, and is left out all the same
    for name in ("c.txt", "d.txt"):
        (path / name).symlink_to(path / ".cache/outside")
    for name in ("e.txt", "f.txt"):  # two texts that are equal, as cache.type symlink keeps them
        (path / name).symlink_to(path / ".dvc/cache/files/md5/aa/bb")
    (path / "g.txt").hardlink_to(path / "b.txt")  # so does cache.type hardlink
    assert [file.name for file in find_files(config)] == [
        "b.txt",
        "c.txt",
        "e.txt",
        "f.txt",
        "g.txt",
    ]
    left_out = "links to a text that is read already: 2; names that begin with a dot: 2"
    assert in_words(find_sources(config)[0].left_out) == left_out


def test_links_to_folders_that_a_pattern_leaves_out_are_told(folder):
    path, config = folder
    (path / ".elsewhere").mkdir()
    (path / "a.txt").write_text("a")
    (path / "link").symlink_to(".elsewhere")
    found, *_ = find_sources(replace(config, glob="**/*.txt"))
    assert in_words(found.left_out) == "links to folders: 1; names that begin with a dot: 1"


def test_a_folder_that_cannot_be_read_is_told(folder):
    path, config = folder
    (path / "a.txt").write_text("text")
    (path / "locked").mkdir(mode=0o000)
    with pytest.raises(PermissionError, match="locked"), as_nobody(path):
        find_sources(config)


@contextmanager
def as_nobody(path):
    """Without the rights of root, for whom no folder is locked."""
    if os.geteuid() != 0:
        yield
        return
    for folder in (path, *path.parents[:-2]):
        folder.chmod(0o755)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_document_keeps_no_memory_mapping_of_its_own(folder):
    path, config = folder
    for i in range(2000):
        (path / f"{i}.txt").write_text("text")

    def mappings():
        return len(Path("/proc/self/maps").read_text().splitlines())

    before = mappings()
    kept = list(read_documents(config, Counter()))
    assert len(kept) == 2000
    assert mappings() - before < 100  # the kernel allows 65,530


@pytest.mark.parametrize(("given", "found"), [
    ("**/*", "a.txt b/c.txt b/d/e.md"), ("*", "a.txt"), ("**/*.txt", "a.txt b/c.txt"),
    ("b/**/*", "b/c.txt b/d/e.md"), ("b/*", "b/c.txt"), ("*/*/*.md", "b/d/e.md"),
    ("**/d/*", "b/d/e.md"), ("**", "a.txt b/c.txt b/d/e.md"), ("**/[ab].*", "a.txt"),
    ("./b//c.tx?", "b/c.txt"), ("b/**/**/*.md", "b/d/e.md"),
])  # fmt: skip
def test_a_pattern_means_what_it_means_to_python(folder, given, found):
    path, config = folder
    for name in ("a.txt", "b/c.txt", "b/d/e.md", "b/.f.txt"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(name)
    assert texts(replace(config, glob=given)) == found.split()
    by_pathlib = {file for file in path.glob(given) if file.is_file() and file.name[0] != "."}
    assert given == "**" or by_pathlib == {path / name for name in found.split()}


def test_package_sources_are_the_published_files():
    got = dict(python_sources("networkx==3.6.1"))
    assert "networkx/algorithms/dag.py" in got
    assert not [path for path in got if "/tests/" in path or not path.endswith(".py")]
    assert list(got) == sorted(got)


def test_the_licence_of_a_package_is_the_published_one():
    name, text = license_of("networkx==3.6.1")
    assert name == "BSD-3-Clause"
    assert "Copyright (c) 2004-2025, NetworkX Developers" in text
    name, text = license_of("sympy==1.14.0")
    assert name == "BSD"
    assert "Copyright (c) 2006-2023 SymPy Development Team" in text
    assert "Ondřej" not in text  # AUTHORS, a file beside it, is no licence


@pytest.mark.parametrize(
    ("requirement", "kind", "message"),
    [
        ("networkx==3.0", EnvironmentFault, "expected networkx==3.0, found 3.6.1"),
        ("no-such-package==1", EnvironmentFault, "no-such-package is not installed"),
        ("networkx", InputError, "networkx pins no version"),
    ],
)
def test_another_installed_version_is_an_error(requirement, kind, message):
    with pytest.raises(kind, match=message):
        list(python_sources(requirement))


def test_an_altered_installed_file_is_an_error(tmp_path, monkeypatch):
    package = tmp_path / "fake.py"
    package.write_text("altered")
    info = tmp_path / "fake-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake\nVersion: 1.0\n")
    (info / "RECORD").write_text("fake.py,sha256=AAAA,7\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EnvironmentFault, match=r"fake.py: differs from fake==1.0"):
        list(python_sources("fake==1.0"))
