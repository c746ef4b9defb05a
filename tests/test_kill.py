"""Kill it anywhere: the same command goes on and ends in the bytes of an undisturbed run.

Signals are real and go to real dvc commands. pytest by itself sends each signal once and strikes
each target, place and moment once; `pytest -m soak` runs the others.
"""

import time

import pytest
import yaml

from tests.kill import (
    SIGNALS,
    TARGETS,
    Victim,
    commit,
    copied,
    git,
    heal,
    last_step,
    lent,
    litter,
    living,
    outputs,
    resumed_at,
    run,
    running_stage,
    share_out,
    survivors,
    versioned,
)

STEPS, INTERVAL, MIDDLE = 240, 20, "step  70/240"
UNSAVED = 2 * INTERVAL  # steps that SIGKILL may cost: since the last save, and while it was written
EXPERIMENT = ("dvc", "exp", "run", "train", "-n", "faster", "-S", "train.lr=2e-2")
TRAIN = ("dvc", "repro", "train")
INT, TERM, KILL = SIGNALS


class Undisturbed:
    """A project whose data is prepared, and what its run and its experiment end in."""

    def __init__(self, shared, num_processes=1):
        self.fresh = versioned(shared / "fresh", STEPS, INTERVAL)
        if num_processes > 1:
            share_out(self.fresh, num_processes)
            commit(self.fresh)
        self.prepared = copied(self.fresh, shared / "prepared")
        done = run(self.prepared, "dvc", "repro", "corpus", "tokens")
        assert done.returncode == 0, done.stdout
        commit(self.prepared)
        whole = copied(self.prepared, shared / "whole")
        assert run(whole, *TRAIN).returncode == 0
        self.outputs = outputs(whole)
        git(whole, "checkout", "-q", ".")
        assert run(whole, *EXPERIMENT, "--temp").returncode == 0
        self.experiment = experiment(whole)


@pytest.fixture(scope="session")
def undisturbed(made_once):
    return made_once("kill", Undisturbed)


@pytest.fixture
def project(undisturbed, tmp_path):
    with lent(undisturbed.prepared, tmp_path / "project") as project:
        yield project


def experiment(project):
    """The dvc.lock of the experiment "faster"; None until it exists."""
    names = git(project, "for-each-ref", "--format=%(refname)", "refs/exps").split()
    found = [name for name in names if name.endswith("/faster")]
    return git(project, "show", f"{found[0]}:dvc.lock") if found else None


def killed(project, command, moment, target, number):
    """Run a command until its output says `moment`, or that is true, and kill it there."""
    victim = Victim(project, *command)
    if callable(moment):
        victim.wait_until(moment)
    else:
        victim.wait_for(moment)
    victim.kill(target, number)
    code = victim.wait()
    assert survivors(project) == []
    return code, victim.output()


def go_on(project, *command):
    """Heal, and run the same command again; returns its output."""
    heal(project)
    again = run(project, *command)
    assert again.returncode == 0, again.stdout
    assert litter(project) == []
    return again.stdout


@pytest.mark.parametrize(
    ("target", "number"),
    [
        pytest.param(
            target,
            number,
            id=f"{target}-{number.name}",
            marks=[] if first else pytest.mark.soak,
        )
        for target in TARGETS
        for number in SIGNALS
        for first in [(target, number) in {("stage", TERM), ("dvc", KILL), ("group", INT)}]
    ],
)
def test_a_killed_repro_goes_on_where_it_was(project, undisturbed, target, number):
    code, before = killed(project, TRAIN, MIDDLE, target, number)
    if (target, number) == ("dvc", INT):  # DVC lets the stage decide about a Ctrl-C
        assert code == 0
    else:
        assert code != 0
        if target == "stage":  # DVC would also fail for want of outputs if the stage said 0
            assert f"exited with {-9 if number == KILL else 128 + number}" in before
            assert ("stopped, saved at step" in before) is (number != KILL)
        assert "train" not in yaml.safe_load(project.read("dvc.lock"))["stages"]
        repeated = last_step(before) - resumed_at(go_on(project, *TRAIN))
        assert repeated <= (UNSAVED if number == KILL and target != "dvc" else 0)
    assert outputs(project) == undisturbed.outputs


@pytest.fixture(scope="session")
def undisturbed_pair(made_once):
    return made_once("kill-pair", lambda folder: Undisturbed(folder, num_processes=2))


@pytest.mark.soak
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("target", [*TARGETS, "rank"])
def test_a_killed_repro_of_two_processes_goes_on_where_it_was(
    undisturbed_pair, tmp_path, target, number
):
    project = copied(undisturbed_pair.prepared, tmp_path / "project")
    code, before = killed(project, TRAIN, MIDDLE, target, number)
    if (target, number) == ("dvc", INT):
        assert code == 0
    else:
        assert code != 0
        assert "train" not in yaml.safe_load(project.read("dvc.lock"))["stages"]
        repeated = last_step(before) - resumed_at(go_on(project, *TRAIN))
        assert repeated <= (UNSAVED if number == KILL and target != "dvc" else 0)
    assert outputs(project) == undisturbed_pair.outputs


@pytest.mark.parametrize(
    "moment",
    ["publishing", pytest.param("before the first step", marks=pytest.mark.soak), "saving"],
)
@pytest.mark.parametrize("number", [pytest.param(TERM, marks=pytest.mark.soak), KILL])
def test_a_repro_killed_at_its_worst_moments_goes_on(project, undisturbed, moment, number):
    published = project.folder / "models/checkpoints/best.safetensors"
    runs_root = project.folder / ".dvc/tmp/lm-resume"
    condition = {
        "publishing": published.exists,
        "before the first step": "Model has",
        "saving": lambda: any(runs_root.glob("*/step-00000040.safetensors*")),
    }[moment]
    code, before = killed(project, TRAIN, condition, "group", number)
    assert code != 0
    resumed = resumed_at(go_on(project, *TRAIN))
    assert last_step(before) - resumed <= UNSAVED
    assert outputs(project) == undisturbed.outputs


def test_a_repro_killed_while_dvc_hashes_the_model_trains_no_step_again(project, undisturbed):
    code, _ = killed(project, TRAIN, "Final loss", "dvc", KILL)
    assert code != 0
    assert "train" not in yaml.safe_load(project.read("dvc.lock"))["stages"]
    again = go_on(project, *TRAIN)
    assert outputs(project) == undisturbed.outputs
    assert resumed_at(again) == STEPS


@pytest.mark.parametrize("stage", [pytest.param("tokenizer", marks=pytest.mark.soak), "tokens"])
def test_a_repro_killed_while_it_prepares_data_goes_on(undisturbed, tmp_path, stage):
    project = copied(undisturbed.fresh, tmp_path / "project")
    prepare = ("dvc", "repro", "corpus", "tokens")
    code, _ = killed(project, prepare, f"> exec python -m stages.{stage}", "group", KILL)
    assert code != 0
    go_on(project, *prepare)
    assert outputs(project) == outputs(undisturbed.prepared)


def test_a_stage_does_not_begin_when_dvc_died_while_it_was_starting(project):
    project.set("train.max_steps", 99999)
    victim = Victim(project, "dvc", "repro")
    victim.wait_for("> exec python -m stages.train")
    victim.wait_until(lambda: running_stage(project) is not None)
    victim.kill("dvc", KILL)
    victim.wait()
    assert survivors(project) == []


CASES = [
    pytest.param(
        where,
        target,
        number,
        id=f"{where}-{target}-{number.name}",
        marks=[] if first else pytest.mark.soak,
    )
    for target in TARGETS
    for number in SIGNALS
    if (target, number) != ("dvc", INT)
    for where in ("workspace", "temp")
    for first in [(where, target, number) in {("workspace", "group", KILL), ("temp", "dvc", TERM)}]
]


@pytest.mark.parametrize(("where", "target", "number"), CASES)
def test_a_killed_experiment_goes_on_where_it_was(project, undisturbed, where, target, number):
    command = (*EXPERIMENT, *(["--temp"] if where == "temp" else []))
    branch = git(project, "symbolic-ref", "HEAD")
    code, before = killed(project, command, MIDDLE, target, number)
    assert code != 0
    assert experiment(project) is None
    repeated = last_step(before) - resumed_at(go_on(project, *command))
    assert repeated <= (UNSAVED if number == KILL and target != "dvc" else 0)
    assert experiment(project) == undisturbed.experiment
    assert git(project, "symbolic-ref", "HEAD") == branch
    assert git(project, "stash", "list") == ""


@pytest.mark.parametrize("who", ["all", pytest.param("worker", marks=pytest.mark.soak)])
def test_a_queue_whose_worker_was_killed_goes_on(project, undisturbed, who):
    assert run(project, *EXPERIMENT, "--queue").returncode == 0
    assert run(project, "dvc", "queue", "start", warm=False).returncode == 0
    wait(lambda: MIDDLE in queue_output(project))
    for process in living(project):
        if who == "all" or "queue-worker" in process.cmdline():
            process.kill()
    survivors(project, 30 if who == "worker" else 0)  # the stage's own dvc may finish
    assert "Running" in run(project, "dvc", "queue", "status").stdout  # though nothing runs
    assert "queued again" in heal(project)
    before = last_step(queue_output(project))
    assert "Started '1'" in run(project, "dvc", "queue", "start", warm=False).stdout
    wait(lambda: experiment(project) is not None)
    if who == "all":
        assert before - resumed_at(queue_output(project)) <= UNSAVED
    assert experiment(project) == undisturbed.experiment
    wait(lambda: litter(project) == [])


def queue_output(project):
    files = project.folder.glob(".dvc/tmp/exps/run/*/*.out")
    return "".join(file.read_text(errors="replace") for file in files)


def wait(condition):
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
