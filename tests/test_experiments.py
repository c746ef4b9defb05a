"""A week with experiments: queued, compared, gone back to, and what goes wrong on the way.

All with the real dvc, as docs/EXPERIMENTS.md says it.
"""

import hashlib
import json
import shutil
import threading
import time
import venv

import pytest
import yaml
from dvc.utils.hydra import apply_overrides

from tests.kill import commit, dvc, git, heal, outputs, ran, run, versioned
from tests.project import ROOT, Project
from tools.experiments.read import read_experiments
from tools.preset import whole


def locked(project, name):
    """The stages in dvc.lock of an experiment."""
    found = git(project, "for-each-ref", "--format=%(refname)", "refs/exps").split()
    (reference,) = [ref for ref in found if ref.endswith(f"/{name}")]
    return yaml.safe_load(git(project, "show", f"{reference}:dvc.lock"))["stages"]


def work_off_queue(project, experiments):
    """Let a worker run this number of experiments; return DVC's status of the queue."""
    dvc(project, "queue", "start")
    end = time.monotonic() + 600
    while len(ended(project)) < experiments or "Running" in (
        status := dvc(project, "queue", "status")
    ):
        assert time.monotonic() < end
        time.sleep(0.1)
    return status


def ended(project):
    """The queue's experiments whose process has ended, from DVC's notes: it is slow to ask."""
    notes = project.folder.glob(".dvc/tmp/exps/run/*/*.json")
    return [note for note in notes if json.loads(note.read_text())["returncode"] is not None]


def test_an_experiment_is_compared_renamed_branched_and_applied(finished):
    before = outputs(finished)
    output = dvc(finished, "exp", "run", "-n", "first", "-S", "train.lr=2e-2")
    assert ran(output) == ["train", "evaluate", "export"]
    after = outputs(finished)
    metrics = json.loads(dvc(finished, "metrics", "diff", "--json"))
    assert metrics["metrics/eval.json"]["loss_nats"]["diff"] != 0
    params = json.loads(dvc(finished, "params", "diff", "--json"))["params.yaml"]
    assert params == {"train.lr": {"old": 0.01, "new": 0.02, "diff": 0.01}}
    dvc(finished, "exp", "rename", "first", "higher")
    difference = json.loads(dvc(finished, "exp", "diff", "HEAD", "higher", "--json"))
    assert difference["params"]["params.yaml"] == params
    loss = difference["metrics"]["metrics/eval.json"]["loss_nats"]
    assert loss == metrics["metrics/eval.json"]["loss_nats"]
    for name in ("higher", git(finished, "rev-parse", "--short", "HEAD")):
        done = run(finished, "python", "-m", "tools.report", "--compare", name)
        assert done.stdout == "Report in metrics/report-compare.html\n"
        page = finished.folder / "metrics/report-compare.html"
        assert f"<h1>{name} and workspace</h1>" in page.read_text()
        page.unlink()
    for words in ("tools.report --compare", "tools.experiments.compare"):
        done = run(finished, "python", "-m", *words.split(), "nonsense")
        assert (done.returncode, done.stdout.count("\n")) == (2, 1)
        assert done.stdout.startswith("error: unknown Git revision 'nonsense'; `dvc exp list`")
    dvc(finished, "exp", "branch", "higher", "adopted")
    back = dvc(finished, "exp", "run", "-S", "train.lr=1e-2")  # a setting stays: put it back
    assert ran(back) == []  # not one step: the run cache has it
    assert {k: v for k, v in outputs(finished).items() if k != "dvc.lock"} == {
        k: v for k, v in before.items() if k != "dvc.lock"
    }
    dvc(finished, "exp", "apply", "higher")
    assert outputs(finished) == after
    git(finished, "checkout", "-qf", "adopted")
    assert "up to date" in dvc(finished, "status")
    git(finished, "checkout", "-qf", "-")  # without dvc checkout
    assert "modified:           models/model" in dvc(finished, "status")
    dvc(finished, "checkout")
    assert "up to date" in dvc(finished, "status")
    assert outputs(finished) == before


def folder_md5(folder, name, text):
    """DVC's hash of a folder of code, had one of its files this text."""
    contents = {file.name: file.read_bytes() for file in folder.glob("*.py")} | {
        name: text.encode()
    }
    entries = [
        {"md5": hashlib.md5(data).hexdigest(), "relpath": relpath}
        for relpath, data in sorted(contents.items())
    ]
    return hashlib.md5(json.dumps(entries).encode()).hexdigest() + ".dir"


def test_a_queued_grid_runs_the_code_and_settings_of_its_time(finished):
    report = finished.folder / "lm" / "generate" / "stream.py"
    original = report.read_text()
    queued = original + "\n# as it was queued\n"
    report.write_text(queued)
    dvc(finished, "exp", "run", "--queue", "-n", "grid", "-S", "evaluate.seed=1,2")
    report.write_text(original + "\n# the workspace has moved on\n")
    finished.set("evaluate.max_new_tokens", 3)
    before = outputs(finished)
    (finished.folder / "mine").mkdir()
    (finished.folder / "mine" / "a.txt").write_text("text that git does not know\n")
    dvc(finished, "exp", "run", "--queue", "-n", "mine", "-S", "data.path=mine")
    status = work_off_queue(finished, 3)
    assert (status.count("Success"), status.count("Failed")) == (2, 1)
    assert outputs(finished) == before
    assert "moved on" in report.read_text()
    for name, seed in (("grid-1", 1), ("grid-2", 2)):
        lock = locked(finished, name)["evaluate"]
        settings = lock["params"]["params.yaml"]["evaluate"]
        assert (settings["seed"], settings["max_new_tokens"]) == (seed, 16)
        md5 = {entry["path"]: entry["md5"] for entry in lock["deps"]}
        assert md5["lm/generate"] == folder_md5(
            finished.folder / "lm/generate", "stream.py", queued
        )
    said = dvc(finished, "queue", "logs", "mine")
    assert "error: data.path = mine: no such file or folder" in said


def test_results_and_changed_settings_of_experiments_are_read_at_80_columns(finished):
    """Also where the text lies outside of the project, whose files DVC names by their hashes."""
    dvc(finished, "exp", "run", "--temp", "-n", "sliding", "-S", "evaluate.stride=16")
    outside = finished.folder.with_name("text-elsewhere")
    dvc(finished, "exp", "run", "--queue", "-n", "moved", "-S", f"data.path={outside}")
    shutil.copy(ROOT / "Makefile", finished.folder)
    done = run(finished, "env", "COLUMNS=80", "make", "-o", "setup", "experiments")
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    results = ["loss_nats", "bits_per_byte", "valid_loss"]
    assert lines[0].split() == ["experiment", *results, "settings", "that", "differ"]
    (baseline, sliding, queued) = (
        next(line.split() for line in lines if line.split()[0] == name)
        for name in ("workspace", "sliding", "moved")
    )
    loss = json.loads(finished.read("metrics/eval.json"))["loss_nats"]
    assert baseline[1] == f"{loss:.4f}"
    assert baseline[4:] == ["data.path=text"]
    assert float(sliding[1]) < loss
    assert sliding[4:] == ["evaluate.stride=16"]
    assert queued[:5] == ["moved", "(queued)", "-", "-", "-"]
    assert queued[5].startswith("data.path=/")
    named = run(finished, "python", "-m", "tools.experiments", "sliding").stdout
    assert named.splitlines()[1].split() == ["sliding", *sliding[1:4]]


@pytest.mark.parametrize("name", ["default", "smoke"])
def test_an_override_changes_one_line_of_the_settings(tmp_path, name):
    """DVC writes the file anew, in a style of its own: in another one, git would show a dozen."""
    copy = tmp_path / "params.yaml"
    copy.write_text(whole(ROOT / "presets" / f"{name}.yaml"))
    before = copy.read_text().splitlines()
    apply_overrides(copy, ["train.lr=0.123"])
    after = copy.read_text().splitlines()
    changed = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    assert [new for _, new in changed] == ["  lr: 0.123"]


def test_another_python_says_how_to_find_ours(finished, tmp_path):
    venv.create(tmp_path / "other", symlinks=True)
    program = shutil.which("dvc", path=finished.environment()["PATH"])
    finished.set("train.lr", 2e-2)
    done = run(finished, "env", f"PATH={tmp_path}/other/bin:/usr/bin:/bin", program, "repro")
    assert done.returncode != 0
    assert "Traceback" not in done.stdout
    assert f"error: {tmp_path}/other/bin/python has no torch" in done.stdout
    assert "source .venv/bin/activate" in done.stdout
    assert "exited with 3" in done.stdout


def test_a_temporary_experiment_leaves_the_workspace_alone_until_it_is_applied(finished):
    before = outputs(finished)
    dvc(finished, "exp", "run", "--temp", "-n", "aside", "-S", "evaluate.seed=7")
    assert outputs(finished) == before
    assert git(finished, "status", "--porcelain") == ""
    dvc(finished, "remote", "add", "team", "/team")
    commit(finished)
    after = outputs(finished)
    code = finished.folder / "lm" / "train" / "schedule.py"
    edited = code.read_text() + "\n# hours of work\n"
    code.write_text(edited)
    dvc(finished, "exp", "apply", "aside")
    assert outputs(finished) != before
    assert code.read_text() != edited  # swept away without a word
    git(finished, "checkout", "refs/exps/apply/stash", "--", "lm/train/schedule.py")
    assert code.read_text() == edited
    git(finished, "checkout", "HEAD", "--", "lm/train/schedule.py")
    # it took back what was committed since, too
    assert "team" not in dvc(finished, "remote", "list")
    assert heal(finished).endswith("run: git checkout HEAD -- .dvc/config\n")
    git(finished, "checkout", "HEAD", "--", ".")
    dvc(finished, "checkout")
    assert "team" in dvc(finished, "remote", "list")
    assert git(finished, "status", "--porcelain") == heal(finished) == ""
    assert outputs(finished) == after


def test_without_a_commit_experiments_say_so_and_repro_works(tmp_path):
    project = Project(tmp_path / "project")
    git(project, "init", "-q")
    done = run(project, "dvc", "exp", "run", "-S", "train.lr=1e-3")
    assert (done.returncode, "Empty git repo" in done.stdout) == (255, True)
    assert "Running stage 'corpus'" in dvc(project, "repro", "corpus")


def test_experiments_are_read_while_a_worker_sets_one_up(tmp_path, monkeypatch):
    """Its note is empty for an instant, its folder for a while a repository without a commit."""
    project = versioned(tmp_path / "project")
    dvc(project, "exp", "run", "--queue", "-n", "new", "-S", "train.lr=1e-3")
    broker = project.folder / ".dvc/tmp/exps/celery/broker"
    (message,) = (broker / "in").glob("*.msg")
    message.rename(broker / "processed" / message.name)  # as a worker does first
    task, folder = git(project, "rev-parse", "refs/exps/celery/stash"), tmp_path / "task"
    shutil.copytree(project.folder / ".dvc", folder / ".dvc", ignore=lambda *_: ["tmp", "cache"])
    run_folder = project.folder / ".dvc/tmp/exps/run" / task
    run_folder.mkdir(parents=True)
    head = git(project, "rev-parse", "HEAD")
    info = {"git_url": str(folder), "root_dir": str(folder), "dvc_dir": ".dvc", "status": 1}
    info |= {"baseline_rev": head, "location": "dvc-task", "name": "new"}
    note = run_folder / f"{task}.run"
    note.touch()
    git(project, "init", "-q", str(folder))

    def set_up():
        time.sleep(1)
        note.write_text(json.dumps(info))
        time.sleep(2)
        git(project, "-C", str(folder), "fetch", "-q", str(project.folder), "HEAD")
        git(project, "-C", str(folder), "checkout", "-qf", "--detach", "FETCH_HEAD")

    monkeypatch.chdir(project.folder)
    worker = threading.Thread(target=set_up)
    worker.start()
    found = read_experiments([])
    worker.join()
    assert [(one.name, one.state) for one in found[1:]] == [("new", "running")]
