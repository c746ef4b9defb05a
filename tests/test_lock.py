"""A fresh clone, without any data, knows whether its dvc.lock is of its code and settings."""

import pytest

from lm.base.errors import InputError
from tests.kill import cloned, git, run
from tools.lock import LOCK, recorded_hashes

NEW_STAGE = """  new:
    cmd: echo > new
    outs:
      - new
"""
OLD_STAGE = """  old:
    cmd: echo > old
"""


@pytest.fixture
def clone(baseline, tmp_path):
    return cloned(baseline, tmp_path / "clone")


def check(project):
    done = run(project, "python", "-m", "tools.lock")
    return done.returncode, done.stdout.strip()


def test_a_fresh_clone_of_what_ran_is_up_to_date(clone):
    assert not (clone.folder / "models" / "model").exists()
    assert check(clone) == (0, "dvc.lock belongs to this code and these settings")


def test_a_lock_that_is_not_of_this_code_or_these_settings_is_named(clone):
    files = {name: clone.read(name).decode() for name in ("lm/base/rng.py", "dvc.yaml", "dvc.lock")}
    lock = files["dvc.lock"]
    model = lock[lock.index("path: models/model\n") :].split("md5: ")[1][:32]
    for name, changed, fault in [
        ("lm/base/rng.py", files["lm/base/rng.py"] + "# edited\n", "lm/base: modified"),
        ("dvc.yaml", files["dvc.yaml"].replace("stages.train", "stages.train -S train.lr=1"),
         "stage train: changed command"),
        ("dvc.yaml", files["dvc.yaml"].replace("      - lm/train\n", ""),
         "stage train: lm/train is only in one of dvc.yaml and dvc.lock"),
        ("dvc.yaml", files["dvc.yaml"].replace("stages:\n", f"stages:\n{NEW_STAGE}"),
         "stage new: never ran"),
        ("dvc.lock", f"{lock}{OLD_STAGE}", "stage old: in dvc.lock, but not in dvc.yaml"),
        ("dvc.lock", lock.replace(model, "0" * 32, 1),
         "; ".join(f"stage {stage}: read another models/model than the recorded output"
                   for stage in ("evaluate", "export"))),
    ]:  # fmt: skip
        (clone.folder / name).write_text(changed)
        assert check(clone) == (
            2,
            f"error: dvc.lock is stale: {fault}; run `make repro` and commit it",
        )
        (clone.folder / name).write_text(files[name])
    (clone.folder / "lm" / "generate" / "stream.py").unlink()
    (clone.folder / "stages" / "export.py").unlink()
    for words in ("lm/generate: modified", "stages/export.py: deleted"):
        assert words in check(clone)[1]
    clone.set("train.lr", 0.5)
    assert "params.yaml: train: modified" in check(clone)[1]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "not in DVC's format"),
        (b"[]", "not in DVC's format"),
        (b"\xff", "not in DVC's format"),
        (b"schema: '2.0'\nstages:\n", "not in DVC's format"),
        (b"schema: '2.0'\nstages: [train]\n", "not in DVC's format"),
        (b"schema: '2.0'\nstages: {train: 1}\n", "stage train: not in DVC's format"),
        (b"schema: '2.0'\nstages: {train: {outs: [a]}}\n", "stage train: not in DVC's format"),
        (b"stages: [", "not valid YAML: while parsing a flow node"),
    ],
)
def test_a_lock_of_another_form_is_named(tmp_path, monkeypatch, content, fault):
    monkeypatch.chdir(tmp_path)
    LOCK.write_bytes(content)
    with pytest.raises(InputError) as error:
        recorded_hashes()
    assert str(error.value).startswith(f"dvc.lock: {fault}")
    assert str(error.value).endswith("; `git checkout dvc.lock` restores the committed one")


@pytest.mark.parametrize("content", [b"", b"schema: '2.0'\nstages: [train]\n"])
def test_a_lock_of_another_form_is_one_line_and_brought_back(clone, content):
    (clone.folder / "dvc.lock").write_bytes(content)
    code, message = check(clone)
    assert (code, message.count("\n")) == (2, 0)
    assert message.startswith("error: dvc.lock: not in DVC's format; `git checkout dvc.lock`")
    git(clone, "checkout", "dvc.lock")
    assert check(clone)[0] == 0


def test_a_lock_without_stages_says_that_none_ran(clone):
    (clone.folder / "dvc.lock").write_text("schema: '2.0'\n")
    code, message = check(clone)
    assert code == 2
    assert message.startswith("error: dvc.lock is stale: stage corpus: never ran; stage tokenizer:")


def test_without_a_lock_there_is_nothing_to_compare(clone):
    (clone.folder / "dvc.lock").unlink()
    code, message = check(clone)
    assert (code, message) == (2, "error: dvc.lock: no such file; run `make repro` and commit it")
