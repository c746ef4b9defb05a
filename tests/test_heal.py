"""tools.heal: what stops DVC is a state of files; after healing the same command works."""

import copy
import fcntl
import json
import os
import shutil
import subprocess
import sys

import psutil
import pytest
import yaml

from tests.kill import Victim, commit, git, heal, outputs, run, survivors
from tests.project import ROOT
from tools.heal.dvc_files import fault_of_dvc_lock


@pytest.fixture
def project(finished):
    """A project whose pipeline has run; dvc.lock is not committed."""
    git(finished, "reset", "-q", "HEAD~1")
    return finished


@pytest.fixture
def dead():
    """The pid of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def repro(project):
    return run(project, "dvc", "repro")


def claim(project, pid, folder=".dvc/tmp", what="models/model"):
    """An entry in the rwlock, as if a `dvc repro` of this pid were writing."""
    path = project.folder / folder / "rwlock"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"write": {what: {"pid": pid, "cmd": "/bin/dvc repro"}}}))
    return path


def test_what_is_whole_is_left_as_it_is_without_a_word_or_a_heavy_import(project):
    before = {f: f.read_bytes() for f in project.folder.rglob("*") if f.is_file()}
    assert heal(project) == ""
    assert {f: f.read_bytes() for f in before} == before
    heavy = "{'torch', 'dvc', 'psutil'} & {*sys.modules}"
    program = f"import sys, tools.heal.heal; sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_make_repro_heals_first():
    plan = subprocess.run(["make", "-n", "repro"], cwd=ROOT, capture_output=True, text=True).stdout
    assert plan.index("python -m tools.heal") < plan.index("dvc repro")


@pytest.mark.parametrize(
    "torn",
    ["", '{"read": {"/a": [{"pid": 12', "[]", '{"write": {"/a": []}}', '{"read": {"/a": [{}]}}'],
)
def test_a_torn_rwlock_stops_dvc_until_it_is_healed(project, torn):
    (project.folder / ".dvc/tmp/rwlock").write_text(torn)
    assert repro(project).returncode != 0
    assert heal(project) == "healed: .dvc/tmp/rwlock was torn: removed\n"
    assert repro(project).returncode == 0
    assert heal(project) == ""


def test_a_torn_list_of_experiments_stops_dvc_until_it_is_healed(project):
    commit(project)
    (project.folder / ".dvc/tmp/exps").mkdir()
    (project.folder / ".dvc/tmp/exps/rwlock").write_text("")
    command = ("dvc", "exp", "run", "--queue", "-S", "train.lr=2e-2")
    assert run(project, *command).returncode != 0
    assert heal(project) == "healed: .dvc/tmp/exps/rwlock was torn: removed\n"
    assert run(project, *command).returncode == 0


@pytest.mark.parametrize("kind", ["another program", "a zombie"])
def test_a_claim_of_something_that_is_no_dvc_is_removed(project, kind):
    holder = subprocess.Popen(["sleep", "3000" if kind == "another program" else "0"], cwd="/")
    if kind == "a zombie":
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # it has ended, nobody reaps it
    try:
        path = claim(project, holder.pid, what=str(project.folder / "models/model"))
        assert "is busy" in repro(project).stdout
        assert str(holder.pid) in heal(project)
        assert json.loads(path.read_text()) == {}
        assert repro(project).returncode == 0
    finally:
        holder.kill()
        holder.wait()


def test_a_program_that_runs_dvc_as_a_library_keeps_its_claims(project):
    """Its command line need not contain what DVC wrote down, as with `python -m`."""
    program = [sys.executable, "-c", "import time; time.sleep(3000)"]
    holder = subprocess.Popen(program, cwd=project.folder)
    try:
        path = claim(project, holder.pid)
        before = path.read_bytes()
        assert heal(project) == ""
        assert path.read_bytes() == before
        os.utime(path, (1e9, 1e9))  # this program began later
        assert str(holder.pid) in heal(project)
    finally:
        holder.kill()
        holder.wait()


def test_claims_of_pids_that_are_not_seen_here_are_left_to_dvc(project, dead):
    """They may live in another container, where DVC fails when its claim is gone."""
    path = claim(project, dead, what=str(project.folder / "models/model"))
    before = path.read_bytes()
    assert heal(project) == ""
    assert path.read_bytes() == before
    done = run(project, "dvc", "repro", "--force", "train")
    assert done.returncode == 0
    assert "Auto removed" in done.stdout


def test_nothing_is_healed_while_a_training_runs_that_cannot_be_seen(project, dead):
    lock = project.folder / ".dvc/tmp/lm-resume/a/lock"
    lock.parent.mkdir(parents=True)
    lock.write_text(str(dead))
    (project.folder / ".dvc/tmp/rwlock").write_text("")
    with open(lock) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = run(project, "python", "-m", "tools.heal")
        assert done.returncode == 75
        assert "in another container" in done.stdout
    assert "rwlock was torn" in heal(project)


def test_hardlink_locks_of_dvc_are_neither_made_nor_taken(project):
    """With core.hardlink_lock the existence of the file is the lock; it holds a path."""
    lock = project.folder / ".dvc/tmp/lock"
    lock.unlink()
    (project.folder / "dvc.lock").write_bytes(b"schema: '2.0'\nsta")
    lock.write_text("/project/.dvc/tmp/0123456789abcdef.lock")
    assert heal(project) == ""
    lock.unlink()
    assert "dvc.lock was torn" in heal(project)
    assert not lock.exists()


def test_only_the_claims_of_the_dead_are_removed(project):
    project.set("train.max_steps", 99999)
    running = Victim(project, "dvc", "repro")
    running.wait_for("step     5/99999")
    path = project.folder / ".dvc/tmp/rwlock"
    before = path.read_bytes()
    assert heal(project) == ""
    assert path.read_bytes() == before
    entries = json.loads(before)
    zombie = subprocess.Popen(["true"])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    entries["read"]["elsewhere"] = [{"pid": zombie.pid, "cmd": "dvc repro"}]
    path.write_text(json.dumps(entries))
    assert str(zombie.pid) in heal(project)
    zombie.wait()
    assert json.loads(path.read_text()) == json.loads(before)
    assert running.process.poll() is None
    running.kill("group", 9)
    running.wait()


def test_a_dvc_lock_that_dvc_may_be_writing_is_left_alone(project):
    torn = b"schema: '2.0'\nsta"
    (project.folder / "dvc.lock").write_bytes(torn)
    with open(project.folder / ".dvc/tmp/lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert heal(project) == ""
    assert (project.folder / "dvc.lock").read_bytes() == torn
    assert "dvc.lock was torn" in heal(project)


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize("cut", ["at once", "in a key"])
def test_a_cut_dvc_lock_comes_back_from_git_or_from_the_run_cache(project, cut, committed):
    before = outputs(project)
    if committed:
        commit(project)
    lock = project.read("dvc.lock")
    (project.folder / "dvc.lock").write_bytes(lock[: lock.rindex(b"ize:")] * (cut == "in a key"))
    assert repro(project).returncode != 0
    assert ("restored from git" if committed else "DVC writes it again") in heal(project)
    done = repro(project)
    assert done.returncode == 0, done.stdout
    assert "Running stage" not in done.stdout.replace("Running stage 'corpus'", "")
    assert outputs(project) == before


def test_a_torn_dvc_lock_in_git_is_not_brought_back(project):
    (project.folder / "dvc.lock").write_text("schema: '2.0'\nstages:\n")
    commit(project)
    assert "DVC writes it again" in heal(project)
    assert heal(project) == ""


def test_no_cut_of_a_dvc_lock_passes_with_a_half_written_entry(project):
    """Also not one that DVC itself takes for whole, like a size that lost its last digit."""
    lock = project.read("dvc.lock")
    assert fault_of_dvc_lock(lock) is None
    stages = yaml.safe_load(lock)["stages"]
    cuts = [n for n in range(len(lock)) if lock[n - 1 : n] in (b"", b"\n")][::3]
    for cut in cuts + [n + 1 for n in cuts] + [n - 2 for n in cuts[1:]]:
        if fault_of_dvc_lock(lock[:cut]) is None:
            for name, stage in (yaml.safe_load(lock[:cut]).get("stages") or {}).items():
                for kind in ("deps", "outs"):
                    for entry in stage.get(kind) or []:
                        assert entry in stages[name][kind], cut


def test_what_dvc_writes_for_things_that_lie_elsewhere_is_whole(project):
    """A dependency on the web, a folder in a version-aware remote, an output that was missing."""
    web = {"path": "https://x/y", "hash": "md5", "checksum": "12", "size": 3}
    cloud = {"path": "d", "hash": "md5", "files": [{"relpath": "a", "md5": "0" * 32, "size": 1}]}
    whole = {"path": "z", "hash": "md5", "md5": "0" * 32, "size": 1}
    for outs in ([cloud, {"path": "gone", "hash": "md5"}, whole], [cloud]):
        stage = {"cmd": "true", "deps": [web], "outs": outs}
        for stages in ({"one@x": stage}, {"web": {"cmd": "true", "deps": [web]}}):
            lock = {"schema": "2.0", "stages": stages}
            assert fault_of_dvc_lock(yaml.safe_dump(lock, sort_keys=False).encode()) is None


def test_a_dvc_lock_is_replaced_only_by_keeping_it_and_never_in_a_conflict(project):
    commit(project)
    path = project.folder / "dvc.lock"
    conflict = b"<<<<<<< HEAD\n" + path.read_bytes() + b"=======\n>>>>>>> other\n"
    path.write_bytes(conflict)
    assert heal(project) == ""
    assert path.read_bytes() == conflict
    without_line_break = path.read_bytes()[:-1].splitlines(keepends=True)[1:-2]
    path.write_bytes(b"".join(without_line_break)[:-1])
    before = path.read_bytes()
    assert ".dvc/tmp/dvc.lock.torn" in heal(project)
    assert (project.folder / ".dvc/tmp/dvc.lock.torn").read_bytes() == before


def test_a_torn_dvc_lock_is_healed_without_git(project, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    (project.folder / "dvc.lock").write_text("")
    program = [sys.executable, "-m", "tools.heal"]
    environment = os.environ | {"PATH": str(tmp_path / "bin")}
    done = subprocess.run(program, cwd=project.folder, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"DVC writes it again" in done.stdout


def test_an_experiment_that_runs_in_another_worktree_is_left_alone(project):
    commit(project)
    other = project.folder.with_name("other")
    git(project, "worktree", "add", "-q", str(other))
    git(project, "update-ref", "refs/exps/exec/EXEC_BASELINE", "HEAD")
    runner = subprocess.Popen(["bash", "-c", "exec -a dvc sleep 3000"], cwd=other)
    while psutil.Process(runner.pid).cmdline()[:1] != ["dvc"]:  # it is still bash
        assert runner.poll() is None
    try:
        assert heal(project) == ""
        assert "EXEC_BASELINE" in git(project, "for-each-ref")
    finally:
        runner.kill()
        runner.wait()
    heal(project)
    assert "EXEC_BASELINE" not in git(project, "for-each-ref")


def test_a_killed_experiment_gives_back_the_branch_and_the_index(project):
    commit(project)
    branch, note = git(project, "symbolic-ref", "HEAD"), project.folder / "text" / "00.txt"
    command = ("dvc", "exp", "run", "-S", "train.max_steps=99999")
    experiment = Victim(project, *command)
    experiment.wait_for("step     5/99999")
    experiment.kill("group", 9)
    experiment.wait()
    assert survivors(project) == []
    (project.folder / ".git/index.lock").touch()
    assert run(project, "git", "symbolic-ref", "-q", "HEAD").returncode != 0  # detached
    assert run(project, "git", "add", str(note)).returncode != 0
    said = heal(project)
    assert "back on branch" in said
    assert "index.lock" in said
    assert git(project, "symbolic-ref", "HEAD") == branch
    assert git(project, "diff", "--cached", "--name-only") == ""
    assert "max_steps: 99999" in git(project, "diff", "params.yaml")
    assert "refs/exps/exec/EXEC_BASELINE" not in git(project, "for-each-ref")
    assert heal(project) == ""


def in_a_worktree(project):
    other = copy.copy(project)
    other.folder = project.folder.with_name("worktree")
    git(project, "worktree", "add", "-q", "-b", "side", str(other.folder))
    return other


def in_a_subfolder(project):
    other = copy.copy(project)
    other.folder = project.folder.with_name("outer") / "sub"
    shutil.copytree(project.folder, other.folder)
    shutil.rmtree(other.folder / ".git")
    git(other, "init", "-q", "..")
    commit(other)
    return other


@pytest.mark.parametrize("place", [in_a_worktree, in_a_subfolder])
def test_a_branch_comes_back_where_git_keeps_no_folder_in_the_project(project, place):
    """The traces of a killed `dvc exp run`, as the test above sees them left."""
    commit(project)
    other = place(project)
    branch = git(other, "symbolic-ref", "HEAD")
    (other.folder / ".dvc/tmp").mkdir(exist_ok=True)
    git(other, "update-ref", "refs/exps/exec/EXEC_BASELINE", "HEAD")
    git(other, "checkout", "-q", "--detach")
    lock = other.folder / git(other, "rev-parse", "--git-path", "index.lock")
    lock.touch()
    said = heal(other)
    assert "back on branch" in said
    assert "index.lock was left behind: removed" in said
    assert git(other, "symbolic-ref", "HEAD") == branch
    assert heal(other) == ""


def test_a_project_without_git_works_and_uses_git_once_it_is_there(project):
    (project.folder / ".git").rename(project.folder / "kept")
    modules = ("tools.verify", "tools.report.plots")
    for module in modules:
        done = run(project, "python", "-m", module)
        assert (done.returncode, done.stdout.count("\n")) == (3, 1), done.stdout
        assert "make heal" in done.stdout
    assert "core.no_scm in .dvc/config.local: set" in heal(project)
    assert heal(project) == ""
    assert "up to date" in repro(project).stdout
    for module in modules:
        done = run(project, "python", "-m", module)
        assert done.returncode == 0, done.stdout
    done = run(project, "python", "-m", "tools.experiments.compare")
    assert (done.returncode, done.stdout.count("\n")) == (3, 1), done.stdout
    assert "git init" in done.stdout
    (project.folder / "kept").rename(project.folder / ".git")
    assert "removed, git is here" in heal(project)
    assert "no_scm" not in project.read(".dvc/config.local").decode()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to somebody else")
def test_a_repository_that_git_does_not_trust_is_one_line(project, tmp_path, monkeypatch):
    commit(project)
    for variable in ("HOME", "XDG_CONFIG_HOME"):  # where it might be trusted
        monkeypatch.setenv(variable, str(tmp_path))
    for path in (project.folder, project.folder / ".git"):
        os.chown(path, 12345, 12345)
    for command in (("heal",), ("report",), ("report.plots", "HEAD")):
        done = run(project, "python", "-m", f"tools.{command[0]}", *command[1:])
        assert (done.returncode, done.stdout.count("\n")) == (3, 1), done.stdout
        assert f"--add safe.directory {project.folder}" in done.stdout


def test_the_repository_of_a_git_hook_is_not_taken_for_the_projects(project, tmp_path):
    commit(project)
    git(project, "init", "-q", "--bare", str(tmp_path / "other"))
    git(project, "update-ref", "refs/exps/exec/EXEC_BASELINE", "HEAD")
    git(project, "checkout", "-q", "--detach")
    done = run(project, "env", f"GIT_DIR={tmp_path}/other", "python", "-m", "tools.heal")
    assert "back on branch" in done.stdout


def test_a_head_that_somebody_detached_or_moved_stays_where_it_is(project, dead):
    commit(project)
    git(project, "checkout", "-q", "--detach")
    assert heal(project) == ""
    claim(project, dead, ".dvc/tmp/exps", "workspace")
    git(project, "commit", "-q", "--allow-empty", "-m", "work on the detached head")
    head = git(project, "rev-parse", "HEAD")
    assert "back on branch" not in heal(project)
    assert run(project, "git", "symbolic-ref", "-q", "HEAD").returncode != 0
    assert git(project, "rev-parse", "HEAD") == head


@pytest.mark.parametrize("moment", ["stashed", "half applied", "applied", "stashed with params"])
def test_changes_that_dvc_had_stashed_come_back(project, dead, moment):
    """The states that `dvc exp run` passes through while it sets up an experiment."""
    commit(project)
    edited = project.folder / ".dvcignore"
    edited.write_text("# mine\n")
    claim(project, dead, ".dvc/tmp/exps", "workspace")
    git(project, "stash", "push", "-q")
    git(project, "checkout", "-q", "--detach")
    if moment == "half applied":
        edited.write_text("")
    elif moment != "stashed":
        git(project, "stash", "apply", "-q")
    if moment == "stashed with params":
        project.set("train.lr", 5.0)
    assert "back on branch" in heal(project)
    assert edited.read_text() == "# mine\n"
    assert git(project, "diff", "--name-only") == ".dvcignore"
    kept = git(project, "stash", "list")
    assert ("left by a killed experiment" in kept) == (
        moment in ("half applied", "stashed with params")
    )
    assert len(kept.splitlines()) <= 1
    assert heal(project) == ""


def test_a_stash_of_the_user_is_not_touched(project, dead):
    commit(project)
    (project.folder / ".dvcignore").write_text("# mine\n")
    git(project, "stash", "push", "-q")
    os.utime(claim(project, dead, ".dvc/tmp/exps", "workspace"), (2e9, 2e9))  # a later experiment
    heal(project)
    assert len(git(project, "stash", "list").splitlines()) == 1
    assert git(project, "diff", "--name-only") == ""


@pytest.mark.parametrize("how", ["untracked", "named", "later", "copied"])
def test_a_stash_after_a_killed_experiment_is_not_lost(project, dead, how):
    commit(project)
    path, mine = claim(project, dead, ".dvc/tmp/exps", "workspace"), project.folder / "mine.py"
    mine.write_text("a day of work\n")
    git(project, "add", *([] if how == "untracked" else ["mine.py"]), ".dvcignore")
    if how == "later":
        os.utime(path, (1e9, 1e9))
    options = {"untracked": ["-u"], "named": ["-m", "mine"]}.get(how, [])
    git(project, "stash", "push", "-q", *options)
    if how == "copied":
        git(project, "stash", "apply", "-q")
    kept = git(project, "stash", "list")
    said = heal(project)
    assert git(project, "stash", "list") == kept
    assert ("equals the workspace" in said) == (how == "copied")


def test_a_head_detached_later_survives_an_old_killed_experiment(project):
    commit(project)
    git(project, "update-ref", "refs/exps/exec/EXEC_BASELINE", "HEAD")
    os.utime(project.folder / ".git/refs/exps/exec/EXEC_BASELINE", (1e9, 1e9))
    git(project, "checkout", "-q", "--detach")
    (project.folder / ".dvcignore").write_text("# staged\n")
    git(project, "add", ".dvcignore")
    assert "back on branch" not in heal(project)
    assert run(project, "git", "symbolic-ref", "-q", "HEAD").returncode != 0
    assert git(project, "diff", "--cached", "--name-only") == ".dvcignore"


def test_a_rebase_that_waits_for_the_user_stays_where_it_is(project):
    commit(project)
    edited, main = project.folder / ".dvcignore", git(project, "symbolic-ref", "--short", "HEAD")
    for branch, text in (("-b topic", "theirs"), (main, "ours")):
        git(project, "checkout", "-q", *branch.split())
        edited.write_text(f"# {text}\n")
        commit(project)
    git(project, "checkout", "-q", "topic")
    git(project, "update-ref", "refs/exps/exec/EXEC_BASELINE", "HEAD")
    assert run(project, "git", "rebase", "-q", main).returncode != 0
    assert heal(project) == ""
    assert "rebase in progress" in git(project, "status")
    assert git(project, "diff", "--name-only", "--diff-filter=U") == ".dvcignore"


def test_half_copied_files_of_a_killed_dvc_are_removed_and_no_others(project, dead):
    name = ".Abcdefghij_lmnopqrs-01.tmp"
    elsewhere = project.folder.with_name("shared")
    (project.folder / "linked").symlink_to(elsewhere)
    ours = [project.folder / place / name for place in (".dvc/cache/files/md5/00", "models")]
    others = [
        elsewhere / name,
        project.folder / "notes.tmp",
        project.folder / ".dvc/cache" / "x.tmp",
    ]
    for path in (*ours, *others):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    claim(project, dead)
    assert heal(project).count(name) == 2
    assert not [path for path in ours if path.exists()]
    assert all(path.exists() for path in others)
