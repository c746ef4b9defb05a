"""What a stage reads must stay as it was: DVC would record the new input with the old output."""

import argparse
import hashlib
import os
import shutil
from functools import partial
from pathlib import Path

import pytest

import stages.run
from lm.base.errors import InputError
from stages.run import Inputs
from tests.kill import copied, outputs
from tests.project import wait_for


@pytest.fixture
def inputs(tmp_path, monkeypatch, project):
    """The inputs of a stage that reads data/ and the sections model and train."""
    monkeypatch.chdir(project.folder)
    monkeypatch.setattr(stages.run, "_imported_code", partial(dict, {"lm/base/rng.py": "?"}))
    arguments = argparse.Namespace(overrides=["train.lr=0.5"])
    (project.folder / "data" / "some").mkdir()
    for name in ("a", "b"):
        (project.folder / "data" / "some" / name).write_text(name)
    inputs = Inputs(arguments, ["model", "train", "runtime"])
    inputs.code = {"lm/base/rng.py": stages.run.sha256_file(Path("lm/base/rng.py"))}
    inputs.watch(Path("data/some"))
    return inputs


def append(file):
    with open(file, "a") as opened:
        opened.write("x")


def flip_keeping_the_time(file):
    times = Path(file).stat()
    Path(file).write_text("z")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda p: append("data/some/a"), "data/some/a"),
        (lambda p: flip_keeping_the_time("data/some/a"), "data/some/a"),
        (lambda p: os.truncate("data/some/b", 0), "data/some/b"),
        (lambda p: Path("data/some/a").unlink(), "data/some/a"),
        (lambda p: append("data/some/new"), "data/some/new"),
        (lambda p: append("lm/base/rng.py"), "lm/base/rng.py"),
        (lambda p: Path("lm/base/rng.py").unlink(), "lm/base/rng.py"),
        (lambda p: p.set("model.d_ff", 96), r"params.yaml: model.d_ff \(64 -> 96\)"),
        (lambda p: p.set("train.seed", 5), r"params.yaml: train.seed \(1337 -> 5\)"),
    ],
)
def test_a_changed_input_is_named(inputs, project, change, what):
    inputs.check()
    change(project)
    with pytest.raises(InputError, match=f"^{what} has changed since the stage read it; nothing"):
        inputs.check()
    if what.startswith("data"):
        with pytest.raises(InputError, match=f"^{what} has changed"):
            inputs.check_files()


def test_what_leaves_the_result_alone_is_no_change(inputs, project):
    os.utime("data/some/a")
    shutil.copy("data/some/b", "data/some/copy")
    Path("data/some/copy").replace("data/some/b")
    project.set("runtime.log_interval", 7)
    project.set("evaluate.seed", 7)
    project.set("train.lr", 0.25)  # overridden on the command line
    inputs.check()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda: append("text/00.txt"), "text/00.txt"),
        (lambda: flip_keeping_the_time("text/01.txt"), "text/01.txt"),
        (lambda: Path("text/02.txt").unlink(), "text/02.txt"),
        (lambda: append("text/new.txt"), "text/new.txt"),
        (lambda: append("text/.hidden"), None),
        (lambda: append("text/notes.md"), None),
    ],
)
def test_text_is_watched_without_being_read(inputs, project, change, what):
    def listing():
        return sorted(Path("text").glob("[!.]*.txt"))

    assert len(inputs.watch_without_hashing(listing)) == 60
    assert not [file for file in inputs.files if file.parent == Path("text")]
    inputs.check()
    change()
    if what is None:
        inputs.check()
    else:
        with pytest.raises(InputError, match=f"^{what} has changed since the stage read it"):
            inputs.check()


def test_what_is_recorded_is_the_code_that_ran(project):
    """Python's bytecode cache would run what the file no longer says: same size, same time."""
    module = project.folder / "lm" / "extra.py"
    module.write_text("value = 1\n")
    for writes in ("1", ""):  # with an empty variable Python keeps what it compiled
        project.run("python", "-c", "import lm.extra", PYTHONDONTWRITEBYTECODE=writes)
    times = module.stat()
    module.write_text("value = 2\n")
    os.utime(module, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert project.run("python", "-c", "import lm.extra; print(lm.extra.value)").stdout == "1\n"
    program = (
        "import stages, lm.extra, pathlib\n"
        "print(lm.extra.value, stages.EXECUTED[pathlib.Path(lm.extra.__file__)])"
    )
    sha256 = hashlib.sha256(b"value = 2\n").hexdigest()
    assert project.run("python", "-c", program).stdout == f"2 {sha256}\n"


@pytest.fixture
def long(long_run, tmp_path):
    """A prepared project whose run can be caught, and its outputs when left alone."""
    project = copied(long_run[0], tmp_path / "project")
    yield project, long_run[1]
    project.close()


def ends_with(process, message):
    said, error = process.communicate(timeout=300)
    assert process.returncode == 2, error
    assert message in error
    assert len(error.strip().splitlines()) == 1
    return said


def test_an_edit_during_training_is_no_wrong_record_and_loses_nothing(long):
    """The next checkpoint says so, once; put back, the finished training is published."""
    project, straight = long
    code = project.folder / "lm" / "train" / "optim.py"
    before = code.read_text()
    process = project.train_until("step  40/", warm=True)
    code.write_text(before + "# an edit\n")
    project.set("train.lr", 0.5)
    edits = "lm/train/optim.py, params.yaml: train.lr (0.01 -> 0.5)"
    warning = f"warning: {edits} has changed since the stage read it; the stage goes on as it began"
    wait_for(process, warning)
    assert warning not in ends_with(process, f"{edits} has changed since the stage read it; noth")
    assert not (project.folder / "models" / "model").exists()
    code.write_text(before)
    project.set("train.lr", 0.01)
    result = project.stage("train")
    assert "Resumed at step 160" in result.stdout
    assert outputs(project) == straight


def soak(damage):
    return pytest.param(damage, marks=pytest.mark.soak)


def truncate(file):
    os.truncate(file, 100)


def replace_file(file):
    scratch = file.parents[3] / "other"  # beside the file it would be a new one, named itself
    scratch.write_bytes(file.read_bytes()[:-2])
    scratch.replace(file)


def flip(file):
    with open(file, "r+b") as opened:
        byte = opened.read(1)
        opened.seek(0)
        opened.write(bytes([byte[0] ^ 1]))


def nonsense(file):
    """Ids beyond the vocabulary, in place, as `dd conv=notrunc` writes them."""
    with open(file, "r+b") as opened:
        opened.write(b"\xff" * file.stat().st_size)


@pytest.mark.parametrize("damage", [truncate, soak(append), soak(flip), replace_file, nonsense])
def test_tokens_damaged_during_training_stop_it(long, damage):
    """Nothing is published or saved after the damage; with the file restored it goes on."""
    project, straight = long
    file = project.folder / "data" / "tokens" / "train" / "text-00000.bin"
    data = file.read_bytes()
    process = project.train_until("step  40/", warm=True)
    damage(file)
    ends_with(process, "data/tokens/train/text-00000.bin")
    assert not (project.folder / "models" / "model").exists()
    file.unlink()
    file.write_bytes(data)
    result = project.stage("train")
    assert "Resumed at step " in result.stdout
    assert outputs(project) == straight
