"""Text from the web: `dvc import-url` pins it, notices a change, and shares it without the web."""

import hashlib

import yaml

from tests.kill import cloned, commit, dvc, ran, versioned
from tests.servers import http
from tests.test_remotes import says

TEXT, PIN = "data/tale.txt", "data/tale.txt.dvc"


def test_an_imported_text_is_pinned_used_updated_and_shared(tmp_path):
    project = versioned(tmp_path / "project")
    dvc(project, "remote", "add", "--default", "team", str(tmp_path / "remote"))
    upstream = tmp_path / "web" / "tale.txt"
    upstream.parent.mkdir()
    upstream.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(2000)))
    with http(upstream.parent) as web:
        dvc(project, "import-url", f"{web.url}/tale.txt", TEXT)
        first = pinned(project)
        assert first == (upstream.stat().st_size, md5(upstream))
        project.set("data.path", TEXT)
        project.set("data.split", "tail")
        assert ran(dvc(project, "repro", "tokens")) == ["tokenizer", "tokens"]
        commit(project)
        assert "didn't change" in dvc(project, "update", PIN)

        upstream.write_text(upstream.read_text() + "The end.\n")
        assert ran(dvc(project, "repro", "tokens")) == []  # the pinned text, not the newest
        dvc(project, "update", PIN)
        assert pinned(project) == (upstream.stat().st_size, md5(upstream)) != first
        assert ran(dvc(project, "repro", "tokens")) == ["tokenizer", "tokens"]
        commit(project)
        dvc(project, "push")

    says(dvc(project, "update", PIN, code=1), "does not exist")
    assert not (project.folder / TEXT).exists()
    dvc(project, "checkout", PIN)
    clone = cloned(project, tmp_path / "clone")
    dvc(clone, "pull", PIN)
    assert ran(dvc(clone, "repro", "--pull", "tokens")) == []
    assert project.read(TEXT) == clone.read(TEXT) == upstream.read_bytes()


def pinned(project):
    """Size and hash that the committed .dvc file holds."""
    (out,) = yaml.safe_load(project.read(PIN))["outs"]
    return out["size"], out["md5"]


def md5(file):
    return hashlib.md5(file.read_bytes()).hexdigest()
