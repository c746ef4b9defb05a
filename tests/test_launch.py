"""Stage train by several processes, as a user runs it: the same bytes, and orderly ends."""

import json
import re
import shutil
import signal
import time

import pytest

from stages.launch import leave_with
from tests.kill import copied, dvc, git, lent, living_ranks, outputs, share_out, survivors
from tests.project import one_line, wait_for

TWO = "runtime.num_processes=2"
FOUR = "runtime.num_processes=4"


@pytest.fixture(scope="session")
def shared_run(long_run, made_once):
    """A run to be shared out: its project before it, and what it ends in by one process."""

    def make(folder):
        project = copied(long_run[0], folder / "project")
        share_out(project, 1)
        project.set("train.max_steps", 48)
        project.set("runtime.log_interval", 1)
        whole = copied(project, folder / "whole")
        whole.prepare("train")
        return project, outputs(whole)

    return made_once("shared", make)


@pytest.fixture
def shared(shared_run, tmp_path):
    with lent(shared_run[0], tmp_path / "project") as project:
        yield project, shared_run[1]


def saved(project):
    """The manifests of the checkpoints of its unfinished runs."""
    return list(project.folder.glob(".dvc/tmp/lm-resume/*/step-*.json"))


def assert_goes_on(project, straight, *overrides):
    """By one process, or as many as set, to the bytes of a run that nobody disturbed."""
    again = project.stage("train", *overrides)
    assert again.returncode == 0, again.stderr
    assert "Resumed at step" in again.stdout
    assert outputs(project) == straight


@pytest.mark.parametrize(
    ("codes", "code", "said"),
    [
        ({1: 3, 0: 2}, 2, "2"),  # 3 may only mean that it has lost the other
        ({0: 3, 1: 3}, 3, "3"),
        ({1: -9, 0: 3}, 3, "3"),
        ({1: -9, 0: -15}, 3, "rank 1 was ended by SIGKILL; what was saved is intact"),
    ],
    ids=str,
)
def test_the_code_of_the_rank_that_failed_is_told_before_those_that_lost_it(codes, code, said):
    error = leave_with(codes)
    assert (error.code if isinstance(error, SystemExit) else error.exit_code) == code
    assert str(error).startswith(said)


def test_dvc_repro_with_two_processes_ends_in_the_bytes_of_one(shared):
    project, straight = shared
    project.set("runtime.num_processes", 2)
    git(project, "init", "-q")
    said = dvc(project, "repro", "--single-item", "train")
    assert ", 2 processes\n" in said
    assert said.count("Model has") == 1  # rank 0 alone speaks
    assert said.count("step 48/48") == 1
    found = outputs(project)
    assert found.pop("dvc.lock")
    assert found == straight
    performance = json.loads(project.read("metrics/performance.json"))
    assert performance["num_devices"] == 2
    assert len(performance["forward_seconds_median_by_rank"]) == 2


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.soak)],
)
def test_a_signal_to_the_launcher_saves_and_one_process_goes_on(shared, number, code):
    project, straight = shared
    process = project.train_until("step 20/", TWO)
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == code
    assert err.startswith("stopped, saved at step ")
    assert err.count("\n") == 1
    assert survivors(project) == []
    assert_goes_on(project, straight)


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.soak)])
def test_a_killed_rank_is_named_and_the_run_goes_on(shared, rank):
    project, straight = shared
    process = project.train_until("step 20/", TWO)
    living_ranks(project)[rank].kill()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 3
    # whichever notices first, the launcher or another rank
    assert re.search(rf"rank {rank} (was ended by SIGKILL|in step \d+: it has ended); what", err)
    assert err.count("\n") == 1
    assert survivors(project) == []
    assert_goes_on(project, straight)


@pytest.mark.soak
def test_a_damaged_checkpoint_is_made_again(shared):
    project, straight = shared
    process = project.train_until("step 20/", TWO)
    living_ranks(project)[1].kill()
    process.communicate(timeout=300)
    newest = max(saved(project)).with_suffix("")
    shard = max(newest.glob("shard-*"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    again = project.run("python", "-m", "stages.train", "-S", TWO)
    assert again.returncode == 0, again.stderr
    assert f"{newest.name}/{shard.name}: content differs from the hash" in again.stdout
    assert "Resumed at step" in again.stdout
    assert outputs(project) == straight


@pytest.mark.soak
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_four_processes_that_sum_in_any_order_resume_to_their_own_bytes(shared, parallel):
    project, _ = shared
    project.set("train.parallel", parallel)
    project.set("train.reduction", "sum")
    project.set("train.max_steps", 40)
    straight = project.run("python", "-m", "stages.train", "-S", FOUR)
    assert straight.returncode == 0, straight.stderr
    expected = outputs(project)
    project.forget_runs()
    process = project.train_until("step 20/", FOUR)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    again = project.run("python", "-m", "stages.train", "-S", FOUR)
    assert "Resumed at step" in again.stdout
    assert outputs(project) == expected


@pytest.mark.soak
@pytest.mark.parametrize("rank", [1, 0])
def test_a_hung_rank_is_named_and_ended(shared, rank):
    project, straight = shared
    process = project.train_until("step 20/", TWO, "runtime.process_timeout_s=4")
    living_ranks(project)[rank].suspend()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 3
    assert f"lost rank {rank} in step " in err
    assert "no answer within runtime.process_timeout_s" in err
    assert err.count("\n") == 1
    assert survivors(project) == []
    assert_goes_on(project, straight)


@pytest.mark.soak
def test_torchrun_restarts_what_a_killed_rank_has_ended(shared):
    project, straight = shared
    torchrun = ("torchrun", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "stages.train")
    process = project.start(*torchrun)
    wait_for(process, "step 20/")
    living_ranks(project)[1].kill()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "Resumed at step" in out
    assert outputs(project) == straight


@pytest.mark.soak
@pytest.mark.parametrize(("rank", "early"), [(0, False), (1, False), (1, True)])
def test_hosts_meet_again_after_a_restart(shared, port, rank, early):
    """Two launchers: after a failure on one host each has another count of restarts."""
    project, straight = shared
    meet = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}")
    here = ("--nnodes", "2", "--nproc-per-node", "1", "--local-addr", "localhost")
    torchrun = ("torchrun", *meet, *here, "--max-restarts", "1", "-m", "stages.train")
    hosts = [project.start(*torchrun, GLOO_SOCKET_IFNAME="lo") for _ in range(2)]
    while rank not in living_ranks(project) or not (early or saved(project)):
        assert [host.poll() for host in hosts] == [None, None]
        time.sleep(0.02)
    living_ranks(project)[rank].kill()
    told = [host.communicate(timeout=300) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], told
    assert early or any("Resumed at step" in out for out, _ in told)
    assert outputs(project) == straight


@pytest.mark.soak
def test_four_processes_end_in_the_bytes_of_one_and_so_do_two_after_them(shared):
    project, straight = shared
    process = project.train_until("step 40/", FOUR)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 143
    assert_goes_on(project, straight, TWO)
    shutil.rmtree(project.folder / "models" / "model")
    project.forget_runs()
    straight_on = project.run("python", "-m", "stages.train", "-S", FOUR)
    assert straight_on.returncode == 0
    assert "Resumed" not in straight_on.stdout
    assert outputs(project) == straight


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.parallel=none"], "train.parallel = none, but there are 2 processes; use ddp or"),
        (["train.reduction=sum", "train.batch_size=5"], "train.batch_size = 5 is not a multiple"),
        (["train.batch_size=12"], "train.batch_size = 12 is not 1, 2, 4, 8, ... times"),
        (["train.micro_batch_size=null"], "train.reduction = tree needs train.micro_batch_size"),
        (["train.dtype=float16"], "has no loss scaling, as needed by train.dtype = float16"),
    ],
    ids=str,
)
def test_settings_that_several_processes_cannot_share_are_refused(shared, overrides, said):
    refused = shared[0].stage("train", TWO, *overrides)
    assert refused.returncode == 2
    assert said in one_line(refused)


@pytest.mark.soak
def test_two_processes_that_diverge_leave_the_curves_of_one(shared):
    project, found = shared[0], []
    for processes in (1, 2):
        failed = project.stage(
            "train", f"runtime.num_processes={processes}", "model.norm=none", "train.lr=2",
            "train.weight_decay=0", "train.warmup_steps=18",
        )  # fmt: skip
        assert failed.returncode == 4
        where = failed.stderr.strip().rpartition("curves up to there: ")[2]
        rows = [line.rpartition(",")[0] for line in project.read(where).decode().splitlines()]
        assert len(rows) > 3
        found.append(rows)
    assert found[0] == found[1]


def test_torchrun_with_settings_for_one_process_is_refused(shared):
    place = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "2"}
    refused = shared[0].stage("train", "train.parallel=none", **place)
    assert refused.returncode == 2
    assert "train.parallel = none is for one process, but there are 2" in one_line(refused)


def other_code(project):
    with open(project.folder / "lm" / "train" / "schedule.py", "a") as file:
        file.write("# another version\n")


def other_data(project):
    (project.folder / "text" / "00.txt").unlink()
    project.prepare("tokenizer", "tokens")


def other_settings(project):
    project.set("runtime.checkpoint_interval", 7)


def only_another_folder(project):
    pass


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (other_code, 2, "rank 1: code: lm/train/schedule.py not as on rank 0"),
        pytest.param(other_data, 2, "rank 1: inputs: data/token", marks=pytest.mark.soak),
        pytest.param(
            other_settings,
            2,
            "rank 1: runtime: checkpoint_interval not as on rank 0",
            marks=pytest.mark.soak,
        ),
        pytest.param(
            only_another_folder,
            3,
            "rank 1: /.*: not the folder in which rank 0 writes",
            marks=pytest.mark.soak,
        ),
    ],
)
def test_hosts_with_other_code_data_settings_or_folders_stop_all(
    shared, port, tmp_path, change, code, said
):
    """As on two machines: each has a folder of its own, and nobody launches both."""
    projects = [shared[0], copied(shared[0], tmp_path / "other")]
    change(projects[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    both = [
        project.start("python", "-m", "stages.train", RANK=str(rank), **place)
        for rank, project in enumerate(projects)
    ]
    said_by = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [code, code], said_by
    assert re.match(f"error: {said}", said_by[0])
    assert said_by[0].count("\n") == 1
    assert said_by[1] == ""
    projects[1].close()


@pytest.mark.parametrize(
    ("parallel", "more"),
    [
        pytest.param("fsdp", [], marks=pytest.mark.soak),
        pytest.param("ddp", [], marks=pytest.mark.soak),
        pytest.param(
            "fsdp",
            ["train.gradient_checkpointing=true", "train.dtype=bfloat16"],
            marks=pytest.mark.soak,
        ),
        pytest.param("ddp", ["train.gradient_checkpointing=true"], marks=pytest.mark.soak),
    ],
    ids=str,
)
def test_compiled_blocks_train_as_one_process_does(shared, parallel, more):
    project, _ = shared
    short = [f"train.parallel={parallel}", "train.max_steps=4", "train.warmup_steps=1", *more]
    assert project.stage("train", *short).returncode == 0
    eager = json.loads(project.read("metrics/train.json"))
    overrides = [word for o in (TWO, "train.compile=true", *short) for word in ("-S", o)]
    done = project.run("python", "-m", "stages.train", *overrides)
    assert done.returncode == 0, done.stderr
    assert "Plan: compiled" not in done.stdout  # that is for auto
    assert json.loads(project.read("metrics/performance.json"))["compiled"] is True
    both = json.loads(project.read("metrics/train.json"))
    for key in ("train_loss", "valid_loss"):
        assert both[key] == pytest.approx(eager[key], rel=2e-2 if "dtype" in str(more) else 1e-4)
