"""Struck at any write: what was finished stays whole, and running again ends in the same bytes."""

import itertools
import re
import shutil
import signal
import subprocess

import pytest

from tests.project import Project, one_line

HERE_ALONE = (".gitignore", "performance.json", "wall_clock.csv")
STAGES = ("tokenizer", "tokens", "train", "evaluate", "export")
FOLDERS = ("models/model", "models/checkpoints", "models/huggingface", "metrics",
           "data/tokenizer", "data/tokens")  # fmt: skip


def files(project):
    """Every output of the stages, and every file that does not belong there."""
    found = {}
    for folder in FOLDERS:
        for file in sorted((project.folder / folder).rglob("*")):
            name = file.relative_to(project.folder).as_posix()
            if file.is_file() and file.name not in HERE_ALONE:
                found[name] = file.read_bytes()
    return found


def remove(project, names):
    for name in names:
        (project.folder / name).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A project, and the outputs of each stage when nothing happens."""
    project = Project(tmp_path_factory.mktemp("crash") / "project")
    project.set("train.max_steps", 4)
    project.set("train.eval_interval", 2)
    project.set("runtime.checkpoint_interval", 2)
    project.set("evaluate.max_new_tokens", 1)
    project.set("runtime.num_workers", 1)  # the process that is struck does the work
    outputs = {}
    for stage in STAGES:
        before = files(project)
        project.prepare(stage)
        outputs[stage] = {k: v for k, v in files(project).items() if k not in before}
    yield project, outputs
    project.close()


def reset(project, stage, outputs):
    """As DVC leaves a workspace before it runs a stage: its outputs are gone."""
    remove(project, outputs[stage])
    project.forget_runs()
    project.forget_shards()
    for litter in project.folder.rglob("*.tmp"):
        litter.unlink()


def assert_whole(project, outputs):
    """Nothing under a final name is half written, except in folders that lack their manifest."""
    expected = {k: v for stage in STAGES
                for k, v in outputs[stage].items()}  # fmt: skip
    for name, data in files(project).items():
        if not name.endswith(".tmp") and not name.startswith("data/tokens/"):
            assert data == expected[name], name


def assert_finished(project, outputs):
    found = files(project)
    for stage in STAGES:
        for name, data in outputs[stage].items():
            assert found.pop(name) == data, name
    assert not found  # no litter


@pytest.mark.parametrize(
    ("stage", "number", "first", "stride"),
    [
        ("tokenizer", signal.SIGKILL, 1, 4),
        pytest.param("tokenizer", signal.SIGKILL, 3, 4, marks=pytest.mark.soak),
        ("tokens", signal.SIGKILL, 1, 4),
        ("evaluate", signal.SIGKILL, 1, 4),
        ("train", signal.SIGKILL, 1, 6),
        pytest.param("tokens", signal.SIGKILL, 3, 4, marks=pytest.mark.soak),
        pytest.param("evaluate", signal.SIGKILL, 3, 4, marks=pytest.mark.soak),
        pytest.param("train", signal.SIGKILL, 4, 6, marks=pytest.mark.soak),
        pytest.param("train", signal.SIGTERM, 1, 4, marks=pytest.mark.soak),
        pytest.param("tokenizer", signal.SIGKILL, 2, 2, marks=pytest.mark.soak),
        pytest.param("tokens", signal.SIGKILL, 2, 2, marks=pytest.mark.soak),
        pytest.param("evaluate", signal.SIGKILL, 2, 2, marks=pytest.mark.soak),
        pytest.param("train", signal.SIGKILL, 2, 3, marks=pytest.mark.soak),
        pytest.param("train", signal.SIGKILL, 3, 3, marks=pytest.mark.soak),
        pytest.param("train", signal.SIGINT, 3, 4, marks=pytest.mark.soak),
        pytest.param("evaluate", signal.SIGTERM, 1, 4, marks=pytest.mark.soak),
        pytest.param("export", signal.SIGKILL, 3, 11, marks=pytest.mark.soak),
    ],
)
def test_struck_before_any_change_of_a_file_it_ends_in_the_same_bytes(
    warm, stage, number, first, stride
):
    project, outputs = warm
    for at in itertools.count(first, stride):
        reset(project, stage, outputs)
        struck = project.warm(stage, at=at, signal=int(number))
        if len(struck["changes"]) < at:  # it came to its end before
            break
        where = f"{stage}, change {at}: {struck['changes'][at - 1]}"
        if struck["status"] == 0:  # a signal that came when training was over
            assert number != signal.SIGKILL, where
            assert_finished(project, outputs)
        else:
            assert struck["status"] in (-number, 128 + number), where + struck["err"]
        assert_whole(project, outputs)
        again = project.warm(stage)
        assert again["status"] == 0, where + again["err"]
        assert_finished(project, outputs)
    assert at > 4


@pytest.mark.parametrize("stage", ["tokenizer", "tokens", "evaluate", "train"])
def test_a_write_that_does_not_fit_is_one_line_and_loses_nothing(warm, stage):
    """A limit on a file's size stands in for a full disk: it strikes in the middle of a write."""
    project, outputs = warm
    sizes = sorted({len(data) for data in outputs[stage].values()})
    for limit in {0, sizes[0] - 1, sizes[len(sizes) // 2] - 1, sizes[-1] // 2, sizes[-1] - 1}:
        reset(project, stage, outputs)
        full = project.warm(stage, limit=limit)
        assert full["status"] == 3, (limit, full["err"])
        (line,) = full["err"].splitlines()
        assert "File too large" in line
        assert "MB are free in" in line
        assert_whole(project, outputs)
        again = project.warm(stage)
        assert again["status"] == 0, again["err"]
        assert_finished(project, outputs)


def in_a_mount(options, folder, command):
    """A command for which `folder` is a file system of its own, with these options."""
    mount = f"mount -t tmpfs -o {options} tmpfs {folder} && exec {command}"
    return "unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount


def mounting_works():
    if not shutil.which("unshare"):
        return False
    return (
        subprocess.run(in_a_mount("size=64k", "/mnt", "true"), capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not mounting_works(), reason="no unprivileged mounts on this machine")
@pytest.mark.parametrize(
    ("stage", "folder", "options", "said"),
    [
        ("train", ".dvc/tmp/lm-resume", "size=300k", "No space left on device"),
        ("train", "models", "ro", "Read-only file system"),
        ("tokens", "data/tokens", "size=12k", "No space left on device"),
        ("evaluate", "metrics", "ro", "Read-only file system"),
        pytest.param(
            "train", "models", "size=300k", "No space left on device", marks=pytest.mark.soak
        ),
        pytest.param(
            "train", ".dvc/tmp/lm-resume", "ro", "Read-only file system", marks=pytest.mark.soak
        ),
    ],
)
def test_a_full_or_read_only_disk_is_named_and_loses_nothing(warm, stage, folder, options, said):
    project, outputs = warm
    reset(project, stage, outputs)
    (project.folder / folder).mkdir(parents=True, exist_ok=True)
    full = project.run(*in_a_mount(options, folder, f"python -m stages.{stage}"))
    assert full.returncode == 3, full.stderr
    line = one_line(full)
    assert said in line
    assert f"{folder}/" in line
    assert bool(re.search(r"\d\.\d MB are free in", line)) is ("No space" in said)
    assert_whole(project, outputs)
    again = project.warm(stage)
    assert again["status"] == 0
    assert ("Resumed at step 4; it is finished" in again["out"]) is (folder == "models")
    assert_finished(project, outputs)
