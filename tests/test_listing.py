"""A listing stands for a folder, as long as the folder is as listed."""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from lm.base.errors import InputError
from lm.prepare.documents import cut_into_shards, read_documents
from lm.prepare.listing import listed_folder, write_listing
from tests.project import ROOT


@pytest.fixture
def listed(tmp_path):
    """A folder of two texts, and its listing."""
    folder, listing = tmp_path / "texts", tmp_path / "texts.listing"
    (folder / "a").mkdir(parents=True)
    for name in ("a/one.txt", "two.txt", ".hidden"):
        (folder / name).write_text(f"text of {name}")
    command = [sys.executable, "-m", "lm.prepare.listing", folder, listing]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2 files\n", "")
    return folder, listing


def test_the_text_behind_a_listing_is_that_of_the_folder(listed, data_config):
    folder, listing = listed
    direct, through = (replace(data_config, path=str(path)) for path in listed)
    assert listed_folder(listing) == folder
    assert cut_into_shards(direct) == cut_into_shards(through)
    texts = [document.text for document in read_documents(through, Counter())]
    assert texts == ["text of a/one.txt", "text of two.txt"]


def test_a_folder_that_is_not_as_listed_is_refused_by_name(listed):
    folder, listing = listed
    again = (
        rf"since {listing} was made; make it again: python -m lm.prepare.listing {folder} {listing}"
    )
    (folder / "new.txt").write_text("new")
    with pytest.raises(InputError, match=rf"new.txt: is new {again}"):
        listed_folder(listing)
    (folder / "new.txt").unlink()
    os.utime(folder / "two.txt", ns=(1, 1))
    with pytest.raises(InputError, match=rf"two.txt: has changed {again}"):
        listed_folder(listing)
    (folder / "two.txt").unlink()
    with pytest.raises(InputError, match=rf"two.txt: is gone {again}"):
        listed_folder(listing)


def test_what_cannot_be_listed_or_is_no_listing_is_told(tmp_path):
    for folder, name, words in (
        ("missing", "x.listing", "missing: no such folder"),
        (".", "x.json", r"x.json: the name of a listing must end in .listing"),
        (".", "x.listing", r"x.listing: lies in the folder that it lists"),
        ("file", "x.listing", r"file: not a folder"),
    ):
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match=words):
            write_listing(tmp_path / folder, tmp_path / name)
    for content in (
        "[]",
        "{}",
        '{"format": 1, "root": 3, "files": {}}',
        '{"format": 1, "root": "/", "files": []}',
    ):
        (tmp_path / "x.listing").write_text(content)
        with pytest.raises(InputError, match=r"x.listing: not a listing"):
            listed_folder(tmp_path / "x.listing")
    (tmp_path / "x.listing").write_text('{"format": 1, "root": "/gone", "files": {}}')
    with pytest.raises(InputError, match=r"x.listing: lists /gone, which is not a folder here"):
        listed_folder(tmp_path / "x.listing")
    command = [sys.executable, "-m", "lm.prepare.listing", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        "error: expected: python -m lm.prepare.listing FOLDER NAME.listing\n",
    )
