"""What others need who use, cite or change the project: one version, a true citation, a picture."""

import os
import re
import shutil
import struct
import subprocess
import sys
import tomllib

import pytest
import yaml

from tests.browser import needs_browser
from tests.project import ROOT, one_line

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MOST_BYTES = 150_000  # of README's picture


def test_version_and_date_are_the_same_everywhere_and_the_citation_has_what_its_format_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changes = (ROOT / "CHANGELOG.md").read_text()
    version, date = re.search(r"^## (\S+) \((\S+)\)$", changes, re.M).groups()
    assert version == PROJECT["project"]["version"] == citation["version"]
    assert date == citation["date-released"]
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["message"]
    assert citation["title"]
    assert all(author["name"] for author in citation["authors"])


def test_dependencies_stand_in_the_files_that_pyproject_names():
    dynamic = PROJECT["tool"]["setuptools"]["dynamic"]
    assert not {"dependencies", "optional-dependencies"} & PROJECT["project"].keys()
    assert dynamic["dependencies"] == {"file": ["requirements.txt"]}
    assert dynamic["optional-dependencies"] == {"dev": {"file": ["requirements-dev.txt"]}}
    assert PROJECT["tool"]["uv"] == {"package": False}


def test_who_wants_to_contribute_reads_two_screens():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) < 120


def size_of(png):
    """Width and height, read from the file's header."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


def test_the_picture_of_the_readme_is_small():
    png = (ROOT / "docs" / "report.png").read_bytes()
    assert size_of(png)[0] == 1200
    assert len(png) < MOST_BYTES


def picture(folder, **environment):
    command = [sys.executable, "-m", "tools.report.picture"]
    environment = {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def page(tmp_path):
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "report.html").write_text("<h1>Training report</h1>")
    return tmp_path


@needs_browser
def test_the_picture_is_the_top_of_the_report(page):
    done = picture(page, PATH=os.environ["PATH"], HOME=str(page))
    assert done.returncode == 0, done.stderr
    assert size_of((page / "docs" / "report.png").read_bytes()) == (1200, 1040)


def test_without_a_browser_or_a_report_the_picture_is_one_line(page):
    done = picture(page, PATH=str(page))
    assert (done.returncode, one_line(done)) == (
        3,
        "error: no chromium or chromium-browser or google-chrome on PATH; "
        "install one and run again",
    )
    shutil.rmtree(page / "metrics")
    done = picture(page, PATH=str(page))
    assert done.returncode == 2
    assert "metrics/report.html: no such file; run `make report` to write it" in one_line(done)
