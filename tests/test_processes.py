"""What processes tell each other: faults of one reach all, and who is lost is named."""

import os
import signal
import time
from dataclasses import replace
from socket import create_connection, create_server
from types import SimpleNamespace

import pytest
import torch

from lm.base.errors import Diverged, EnvironmentFault, InputError, Interrupted
from lm.base.sections import read_section
from lm.base.settings import RuntimeConfig
from lm.machine.processes import joined, number_of_processes
from lm.machine.sharded_tensors import whole
from lm.runs.manifest import verify
from lm.runs.run import Run
from lm.train.loop import train
from lm.train.state import new_state
from tests.ranks import outcomes, together
from tests.test_run import MADE_OF
from tests.test_train import CPU, SPLIT

HANGS_S = 8  # without an answer: a rank is given up
BOTH = pytest.mark.parametrize("parallel", ["ddp", "fsdp"])


def exchanged(processes):
    """A word of each; then what rank 0 alone has done, and what each has."""
    alone = []
    led = processes.lead(lambda: alone.append("here") or f"of rank {processes.rank}")
    own = processes.together(lambda: processes.rank)
    return processes.gather(f"word {processes.rank}"), led, own, len(alone)


def test_all_hear_all_and_one_leads():
    for rank, heard in enumerate(together(3, exchanged)):
        assert heard == (["word 0", "word 1", "word 2"], "of rank 0", rank, int(rank == 0))


@pytest.mark.parametrize(
    ("asked", "parallel", "device", "processes"),
    [
        ("auto", "none", "cuda", 1),
        ("auto", "ddp", "cuda", 4),
        ("auto", "fsdp", "cuda", 4),
        ("auto", "fsdp", "cuda:1", 1),
        ("auto", "fsdp", "cpu", 1),
        (2, "ddp", "cuda", 2),
        (3, "none", "cpu", 3),
    ],
)
def test_there_is_one_process_for_each_gpu_that_they_can_share(
    smoke_params, monkeypatch, asked, parallel, device, processes
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    smoke_params["runtime"]["num_processes"] = asked
    runtime = read_section(RuntimeConfig, smoke_params, "runtime")
    assert number_of_processes(runtime, parallel, torch.device(device)) == processes


@pytest.mark.parametrize(
    ("parallel", "device", "said"),
    [
        (
            "none",
            "cpu",
            "train.parallel = none is for one process, but there are 2; set ddp or fsdp",
        ),
        ("ddp", "cuda:1", "runtime.device = cuda:1 is for one process, but there are 2; set cuda"),
    ],
)
def test_settings_of_one_process_are_refused_to_several_by_one(monkeypatch, parallel, device, said):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, error in (("0", InputError), ("1", SystemExit)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(error) as raised, joined(parallel, torch.device(device), timeout_s=1):
            pass
        assert str(raised.value) == (said if rank == "0" else str(InputError.exit_code))


def faulty(processes, rank, leading):
    def read():
        if rank in (processes.rank, "every"):
            raise InputError("text.txt: no such file")

    (processes.lead if leading else processes.together)(read)
    return "went on"


@pytest.mark.parametrize(
    ("rank", "leading", "said"),
    [
        (1, False, "rank 1: text.txt: no such file"),
        (0, False, "rank 0: text.txt: no such file"),
        (0, True, "text.txt: no such file"),
        ("every", False, "text.txt: no such file"),
    ],
)
def test_a_fault_of_one_or_all_stops_all_and_is_told_once(rank, leading, said):
    told, left = outcomes(2, faulty, rank, leading)
    assert isinstance(told, InputError)
    assert str(told) == said
    assert isinstance(left, SystemExit)  # one of them speaks
    assert left.code == InputError.exit_code


def failing_alone(processes):
    if processes.rank == 1:
        raise EnvironmentFault("out of memory")
    processes.gather("word")


def test_who_tells_why_it_leaves_is_not_called_lost():
    left, told = outcomes(2, failing_alone)
    assert str(told) == "rank 1: out of memory"
    assert isinstance(left, SystemExit)
    assert left.code == EnvironmentFault.exit_code


def beside_a_tracker(processes):
    """What a connection of another library still brings after those of torch have been broken."""
    with create_server(("localhost", 0)) as server, create_connection(server.getsockname()) as ours:
        theirs, _ = server.accept()
        processes.with_own_group()  # made after the connection
        processes.store.set(f"made/{processes.rank}", "")
        processes.store.wait(
            ["made/0", "made/1"]
        )  # by messages, one would leave while another reads
        processes.lost("Connection reset by peer")
        with pytest.raises(RuntimeError):
            processes.gather("word")
        ours.sendall(b"loss 1.5")
        with theirs:
            return theirs.recv(8)


def test_connections_of_other_libraries_outlive_those_of_the_processes():
    assert together(2, beside_a_tracker) == [b"loss 1.5"] * 2


def comparing(processes, parts):
    processes.require_same(parts[processes.rank])
    return "went on"


def test_processes_that_differ_are_named_with_what_differs():
    parts = {
        "code": {"lm/model/transformer.py": "a", "lm/runs/run.py": "b"},
        "inputs": {"tokens": "c"},
    }
    assert together(2, comparing, [parts, parts]) == ["went on"] * 2
    for changed, said in (
        (
            {"code": parts["code"] | {"lm/model/transformer.py": "z"}},
            "rank 2: code: lm/model/transformer.py not as",
        ),
        ({"code": {"lm/model/transformer.py": "a"}}, "rank 2: code: lm/runs/run.py not as"),
        ({"inputs": {"tokens": "z"}}, "rank 2: inputs: tokens not as on rank 0"),
        ({"inputs": {f"text{i}": "z" for i in range(5)} | parts["inputs"]},
         "rank 2: inputs: text0, text1, text2 and 2 more not as on rank 0"),
    ):  # fmt: skip
        told, *others = outcomes(3, comparing, [parts, parts, parts | changed])
        assert isinstance(told, InputError)
        assert said in str(told)
        assert [type(other) for other in others] == [SystemExit, SystemExit]


def in_backward(module, action):
    """Call action(gradient) whenever the gradient by what a module gives is known.

    Not a hook of a weight: under fsdp that which computes is another tensor.
    """
    module.register_forward_hook(lambda module, given, output: hooked(output, action))


def hooked(output, action):
    if output.requires_grad:
        output.register_hook(action)


def lost(processes, model_config, config, hangs, rank=1):
    """Training, which a rank leaves in the middle of the third step."""
    state = new_state(model_config, config, CPU, processes)

    def leave(gradient):
        if processes.rank == rank and state.step == 2:
            if hangs:
                time.sleep(2 * HANGS_S)  # the others have gone by then
            os._exit(0)

    in_backward(state.model.layers[0], leave)
    for _ in train(state, SPLIT, config):
        pass


@pytest.mark.parametrize(
    ("parallel", "hangs"),
    [
        ("ddp", False),
        ("fsdp", False),
        ("fsdp", True),
        pytest.param("ddp", True, marks=pytest.mark.soak),
    ],
)
def test_a_lost_rank_is_named_in_bounded_time_by_one_of_the_others(
    model_config, train_config, parallel, hangs
):
    config = replace(train_config, parallel=parallel, batch_size=6, micro_batch_size=1)
    given = (model_config, config, hangs)
    within = {"timeout_s": HANGS_S} if hangs else {}  # too short to begin in on a busy machine
    first, gone, last = outcomes(3, lost, *given, parallel=parallel, **within)
    assert gone is None
    told, quiet = (first, last) if isinstance(last, SystemExit) else (last, first)
    assert isinstance(told, EnvironmentFault)
    why = "no answer within runtime.process_timeout_s" if hangs else "it has ended"
    said = f"lost rank 1 in step 3: {why}; what was saved is intact: run again"
    assert said in str(told), (first, last)
    assert isinstance(quiet, SystemExit)
    assert quiet.code == EnvironmentFault.exit_code


def lost_beside_a_slow_one(processes, *given):
    """The same; the last rank takes seconds longer than rank 0 to see what has happened."""
    if processes.rank == 2:
        store = processes.store
        processes.store = SimpleNamespace(
            set=store.set, check=lambda keys: time.sleep(0.5) or store.check(keys)
        )
    lost(processes, *given)


@pytest.mark.soak
def test_who_keeps_the_store_waits_for_a_slow_survivor(model_config, train_config):
    config = replace(train_config, parallel="ddp", batch_size=6, micro_batch_size=1)
    told, gone, quiet = outcomes(3, lost_beside_a_slow_one, model_config, config, False)
    assert gone is None
    assert "lost rank 1 in step 3: it has ended" in str(told)
    assert isinstance(quiet, SystemExit)


def test_rank_0_is_named_though_it_keeps_what_the_others_meet_in(model_config, train_config):
    config = replace(train_config, parallel="ddp", micro_batch_size=1)
    gone, told = outcomes(2, lost, model_config, config, False, 0)
    assert gone is None
    assert isinstance(told, EnvironmentFault)
    assert "lost rank 0: it has ended; what was saved is intact: run again" in str(told)


def exhausted(processes, model_config, config):
    state = new_state(model_config, config, CPU, processes)

    def loss(*batch):
        raise MemoryError

    state.model.loss = loss
    next(train(state, SPLIT, config))


def test_out_of_memory_each_says_what_its_share_can_be_cut_into(model_config, train_config):
    config = replace(train_config, parallel="ddp", batch_size=10)
    for rank, told in enumerate(outcomes(2, exhausted, model_config, config)):
        assert f"rank {rank}: out of memory on cpu with micro-batch size 5" in str(told)
        assert "try train.micro_batch_size: 1 or" in str(told)  # 2 does not divide 5


def spoilt(processes, model_config, config, what):
    """Training in which the last rank has something that is not a number in step 3."""
    state = new_state(model_config, config, CPU, processes)

    def spoil(tensor):
        return tensor * float("nan" if state.step == 2 else "1")

    last, layer = processes.rank == processes.size - 1, state.model.layers[1]
    if last and what == "gradient":
        in_backward(layer, spoil)
    elif last:
        layer.register_forward_hook(lambda module, given, output: spoil(output))
    records = list(train(state, SPLIT, config))
    return [r.get("skipped") for r in records], whole(state.model.lm_head.weight)


@BOTH
@pytest.mark.parametrize("what", ["gradient", "loss"])
@pytest.mark.parametrize("reduction", ["sum", "tree"])
def test_not_a_number_on_one_rank_stops_all_and_names_it(
    model_config, train_config, parallel, what, reduction
):
    config = replace(train_config, parallel=parallel, micro_batch_size=1, reduction=reduction)
    told, left = outcomes(2, spoilt, model_config, config, what, parallel=parallel)
    assert isinstance(told, Diverged)
    kind = "gradient norm" if what == "gradient" else "loss"
    assert f"{kind} is nan at step 3, first on rank 1; gradients not finite" in str(told)
    assert "in parameter group 0 (weight decay 0.1)" in str(told)
    assert isinstance(left, SystemExit)
    assert left.code == Diverged.exit_code


@BOTH
def test_a_step_that_is_bad_on_one_rank_is_skipped_by_all(model_config, train_config, parallel):
    config = replace(
        train_config, parallel=parallel, micro_batch_size=1, max_steps=5, on_nonfinite="skip"
    )
    (skipped, weights), theirs = together(
        2, spoilt, model_config, config, "gradient", parallel=parallel
    )
    assert [reason is not None for reason in skipped] == [False, False, True, False, False]
    assert theirs[0] == skipped
    assert "first on rank 1" in skipped[2]
    assert weights.isfinite().all()
    assert (weights == theirs[1]).all()


def stopped(processes, model_config, config, runtime, folder):
    """A run of which one rank is told to stop when the others have just heard that nobody is."""
    state = new_state(model_config, config, CPU, processes)
    try:
        with Run(state, config, runtime, MADE_OF, folder) as run:
            for record in train(state, SPLIT, config):
                run.log(record)
                if processes.rank == 1 and record["step"] == 5:
                    os.kill(os.getpid(), signal.SIGTERM)
                if run.save_due:
                    run.save()
    except Interrupted as left:
        return str(left), left.exit_code


@BOTH
@pytest.mark.parametrize("interval", [4, 5])  # without and with a save that is due anyway
def test_after_a_signal_to_one_rank_all_leave_at_the_same_step(
    model_config, train_config, smoke_params, tmp_path, parallel, interval
):
    config = replace(train_config, parallel=parallel, micro_batch_size=1)
    runtime = read_section(RuntimeConfig, smoke_params, "runtime")
    runtime = replace(runtime, checkpoint_interval=interval)
    given = (model_config, config, runtime, tmp_path)
    left = together(2, stopped, *given, parallel=parallel)
    assert left == [("stopped, saved at step 6; run again to go on", 128 + signal.SIGTERM)] * 2
    (newest,) = tmp_path.glob("*/step-00000006.json")
    verify(newest.with_suffix(""))
