"""The training step and loop: exact accumulation, exact resumption, and clear divergence."""

import io
import math
import os
import platform
import subprocess
import sys
import sysconfig
from dataclasses import replace
from functools import partial
from inspect import unwrap
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch

from lm.base.errors import Diverged, EnvironmentFault, InputError
from lm.base.settings import DTYPES, Dtype, share_of_batch
from lm.data.splits import Split
from lm.machine.device import (
    autocast,
    choose_device,
    describe,
    environment,
    make_deterministic,
    multiplies_natively,
    no_compiling,
)
from lm.machine.gauges import free_memory_bytes
from lm.model.kernels import cross_entropy
from lm.plan.footprint import peak_memory
from lm.runs.checkpoint import load_checkpoint, save_checkpoint
from lm.train.accumulate import OneProcess
from lm.train.batch import get_batch
from lm.train.loop import train
from lm.train.optim import AdamW, gradient_clipping
from lm.train.schedule import get_lr_cosine_schedule
from lm.train.state import new_state
from lm.train.step import forward_backward, gradients_of, loss_of

CPU = torch.device("cpu")
SPLIT = Split("train", (np.arange(3000) * 7919 % 96).astype(np.uint16), 0, end_id=7)


def run(model_config, config, steps=None, state=None):
    """Train for some steps; returns the state and the records."""
    state = state or new_state(model_config, config, CPU)
    records = []
    for record in train(state, SPLIT, config):
        records.append(record)
        if len(records) == steps:
            break
    return state, records


def weights(state):
    return {key: tensor.clone() for key, tensor in state.model.state_dict().items()}


def test_loss_falls_and_records_say_where_it_is(model_config, train_config):
    state, records = run(model_config, train_config)
    assert [record["step"] for record in records] == list(range(1, 21))
    assert records[-1]["tokens"] == 20 * 4 * 16
    assert records[0]["train_loss"] == pytest.approx(math.log(96), abs=0.5)
    assert records[-1]["train_loss"] < records[0]["train_loss"] - 0.5
    assert state.step == 20


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_micro_batches_give_the_gradient_of_the_whole_batch(model_config, train_config, optimizer):
    # eps keeps Adam's first steps, g / |g|, from magnifying rounding errors of tiny gradients
    config = replace(train_config, optimizer=optimizer, max_steps=3, warmup_steps=0, eps=1e-3)
    whole, records = run(model_config, config)
    parts, part_records = run(model_config, replace(config, micro_batch_size=1))
    for a, b in zip(records, part_records, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    tolerance = 1e-5 if optimizer == "adamw" else 2e-3  # Newton-Schulz in bfloat16
    for key, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(
            tensor, parts.model.state_dict()[key], atol=tolerance, rtol=0, msg=key
        )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dropout": 0.2},
        {"dtype": "bfloat16", "micro_batch_size": 2},
        {"dtype": "float16"},
        {"optimizer": "muon", "sampling": "epochs"},
        {"gradient_checkpointing": True, "dropout": 0.1},
        {"intra_document_masking": True, "sampling": "documents"},
    ],
    ids=str,
)
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(model_config, train_config, changes):
    of_model = {key: value for key, value in changes.items() if hasattr(model_config, key)}
    model_config = replace(model_config, **of_model)
    changes = {key: value for key, value in changes.items() if key not in of_model}
    config = replace(train_config, max_steps=9, **changes)
    straight, records = run(model_config, config)
    first, _ = run(model_config, config, steps=4)
    file = io.BytesIO()
    save_checkpoint(first.model, first.optimizer, first.step, file)
    torch.manual_seed(999)  # nothing may depend on the global generator
    second = new_state(model_config, replace(config, seed=5), CPU)
    file.seek(0)
    second.step = load_checkpoint(file, second.model, second.optimizer)
    second.scaler.load_state_dict(first.scaler.state_dict())
    resumed, rest = run(model_config, config, state=second)
    for key, tensor in weights(straight).items():
        assert torch.equal(tensor, resumed.model.state_dict()[key]), key
    timeless = [{k: v for k, v in r.items() if k != "step_s"} for r in records[4:]]
    assert timeless == [{k: v for k, v in r.items() if k != "step_s"} for r in rest]


def test_a_masked_step_learns_from_each_document_as_if_it_stood_alone(model_config, train_config):
    masked = replace(model_config, intra_document_masking=True)
    _, records = run(masked, replace(train_config, batch_size=1), steps=1)
    fresh = new_state(model_config, train_config, CPU).model  # the same weights
    x, y = SPLIT.batch(0, 1, 16, train_config.seed, train_config.sampling)
    ends = [i + 1 for i in range(16) if x[0, i] == 7]
    assert ends, "the window must hold the end of a document"
    ids, targets = torch.tensor(x[0]), torch.tensor(y[0])
    logits = [fresh(document[None])[0] for document in ids.tensor_split(ends) if len(document)]
    expected = cross_entropy(torch.cat(logits), targets)
    assert records[0]["train_loss"] == pytest.approx(expected.item(), rel=1e-6)
    expected.backward()
    norm = gradient_clipping(fresh.parameters(), math.inf).item()
    assert records[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_reduced_precision_stays_near_float32(model_config, train_config):
    losses = {
        dtype: [r["train_loss"] for r in run(model_config, replace(train_config, dtype=dtype))[1]]
        for dtype in ("float32", "bfloat16", "float16")
    }
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.1)
    assert losses["float16"] == pytest.approx(losses["float32"], abs=0.03)
    assert losses["bfloat16"] != losses["float32"]
    assert losses["float16"] != losses["float32"]


def test_a_dtype_that_a_place_does_not_know_is_an_error_there(model_config, train_config):
    """Never computed as one of those it knows."""
    config, sharded = replace(train_config), replace(train_config, parallel="fsdp")
    for each in (config, sharded):
        object.__setattr__(each, "dtype", "float64")
    for place in (
        lambda: new_state(model_config, config, CPU),
        lambda: share_of_batch(sharded, 1),
        lambda: peak_memory(model_config, config, CPU, 1, 0),
        lambda: unwrap(autocast)(CPU, "float64"),  # without the type checks of tests
        lambda: unwrap(multiplies_natively)(CPU, "float64"),
    ):
        with pytest.raises(KeyError, match="float64"):
            place()
    assert get_args(Dtype) == tuple(DTYPES)


def test_float16_lowers_its_scale_instead_of_losing_a_step(model_config, train_config):
    config = replace(train_config, dtype="float16", max_steps=3)
    state = new_state(model_config, config, CPU)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    _, records = run(model_config, config, state=state)
    assert [record["step"] for record in records] == [1, 2, 3]
    assert all(math.isfinite(record["grad_norm"]) for record in records)
    assert state.scaler.get_scale() < 2.0**40


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_divergence_stops_before_the_parameters_change(model_config, train_config, dtype):
    config = replace(train_config, dtype=dtype)
    state, _ = run(model_config, config, steps=2)
    with torch.no_grad():
        state.model.lm_head.weight[3, 3] = float("nan")
    before = weights(state)
    with pytest.raises(Diverged, match=r"loss is nan at step 3; .* parameters untouched"):
        run(model_config, config, state=state)
    assert state.step == 2
    for key, tensor in weights(state).items():
        assert torch.equal(tensor.nan_to_num(), before[key].nan_to_num()), key


def poisoned(state, step, value=float("nan")):
    """Spoil the gradient of one matrix at one step, as a bad kernel would."""
    matrix = state.model.layers[1].ffn.w1.weight
    return matrix.register_hook(lambda g: g * value if state.step + 1 == step else g)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_divergence_names_the_parameters_and_the_batch(model_config, train_config, dtype):
    config = replace(train_config, dtype=dtype)
    state = new_state(model_config, config, CPU)
    poisoned(state, 4)
    with pytest.raises(Diverged) as caught:
        run(model_config, config, state=state)
    assert state.step == 3
    starts = SPLIT.starts(3, 4, 16, config.seed, config.sampling)
    for words in (
        "gradient norm is nan at step 4",
        "in parameter group 0 (weight decay 0.1): layers.1.ffn.w1.weight;",
        f"windows at train tokens {', '.join(map(str, starts))};",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_skipped_step_leaves_everything_but_the_count(model_config, train_config, dtype):
    config = replace(train_config, dtype=dtype, on_nonfinite="skip", max_steps=6)
    state = new_state(model_config, config, CPU)
    poisoned(state, 4)
    states = []
    for record in train(state, SPLIT, config):
        states.append((record, weights(state)))
    assert [record["step"] for record, _ in states] == [1, 2, 3, 4, 5, 6]
    assert ["skipped" in record for record, _ in states] == [
        False,
        False,
        False,
        True,
        False,
        False,
    ]
    assert (state.skipped_steps, state.skipped_in_a_row) == (1, 0)
    for (_, before), (_, after), same in zip(
        states, states[1:], [False, False, True, False, False], strict=False
    ):
        assert all(torch.equal(before[key], after[key]) for key in before) is same


def test_a_run_without_bad_steps_is_the_same_with_skip(model_config, train_config):
    stop, _ = run(model_config, train_config)
    skip, _ = run(model_config, replace(train_config, on_nonfinite="skip"))
    assert all(torch.equal(tensor, weights(skip)[key]) for key, tensor in weights(stop).items())


def test_too_many_skipped_steps_in_a_row_stop(model_config, train_config):
    config = replace(train_config, on_nonfinite="skip", max_skipped_steps=3)
    state = new_state(model_config, config, CPU)
    with torch.no_grad():
        state.model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(
        Diverged, match=r"loss is nan at step 4; .*; after skipping 3 steps in a row"
    ):
        run(model_config, config, state=state)
    assert state.step == 3


def test_get_batch_shifts_by_one_and_draws_anew_without_a_seed():
    data = np.arange(500, dtype=np.uint16)
    torch.manual_seed(0)
    x, y = get_batch(data, 4, 8, "cpu")
    assert x.shape == y.shape == (4, 8)
    assert x.dtype == torch.int64
    assert torch.equal(y, x + 1)
    assert not torch.equal(x, get_batch(data, 4, 8, "cpu")[0])
    torch.manual_seed(0)
    assert torch.equal(x, get_batch(data, 4, 8, "cpu")[0])
    a, b = (get_batch(data, 4, 8, "cpu", seed=1, step=6)[0] for _ in range(2))
    assert torch.equal(a, b)
    with pytest.raises(InputError, match=r"one window needs model.context_length \+ 1 = 501"):
        get_batch(data, 4, 500, "cpu")


def test_the_loop_can_be_written_by_hand_and_equals_train(model_config, train_config):
    config = replace(train_config, weight_decay=0.0, max_steps=6)
    state, records = run(model_config, config)
    by_hand = new_state(model_config, config, CPU).model
    optimizer = AdamW(by_hand.parameters(), lr=config.lr, betas=(config.beta1, config.beta2),
                      eps=config.eps, weight_decay=0.0)  # fmt: skip
    for it in range(1, 7):
        lr = get_lr_cosine_schedule(it, config.lr, config.lr * config.min_lr_ratio, 2, 6)
        for group in optimizer.param_groups:
            group["lr"] = lr
        x, y = get_batch(SPLIT.tokens, 4, 16, "cpu", seed=config.seed, step=it - 1)
        loss = by_hand.loss(x, y)
        assert cross_entropy(by_hand(x), y).item() == pytest.approx(loss.item(), abs=1e-6)
        optimizer.zero_grad()
        loss.backward()
        gradient_clipping(by_hand.parameters(), config.max_grad_norm)
        optimizer.step()
        assert loss.item() == records[it - 1]["train_loss"]
    for key, tensor in by_hand.state_dict().items():
        assert torch.equal(tensor, state.model.state_dict()[key])


def test_weights_are_a_function_of_the_seed(model_config, train_config):
    a, b = (weights(new_state(model_config, train_config, CPU)) for _ in range(2))
    c = weights(new_state(model_config, replace(train_config, seed=1), CPU))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])


def test_an_absent_device_is_an_error_and_never_replaced():
    assert choose_device("cpu") == CPU
    if not torch.cuda.is_available():
        assert choose_device("auto").type in ("cpu", "mps")
        with pytest.raises(
            EnvironmentFault, match=r"device cuda: not available \(this torch .* cpu"
        ):
            choose_device("cuda")


@pytest.fixture
def one_gpu(monkeypatch):
    """What torch would say with one GPU; nothing may run on it."""
    for name, answer in (
        ("is_available", True),
        ("device_count", 1),
        ("get_device_name", "NVIDIA H100 80GB HBM3"),
        ("get_device_capability", (9, 0)),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")  # and put back after the test
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)


def test_a_gpu_is_named_by_its_number(one_gpu, monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    assert current == []
    assert choose_device("cuda:0") == torch.device("cuda", 0)
    assert current == ["cuda:0"]
    with pytest.raises(EnvironmentFault, match=r"^device cuda:1: .* has: cuda:0, cuda, cpu\)"):
        choose_device("cuda:1")


def test_the_memory_of_a_gpu_grows_in_segments_unless_the_user_says_otherwise(one_gpu, monkeypatch):
    choose_device("cuda")
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv("PYTORCH_ALLOC_CONF")
        monkeypatch.setenv(name, "max_split_size_mb:128")
        choose_device("cuda")
        assert "expandable_segments:True" not in os.environ.values()


def test_the_environment_of_a_gpu_names_what_computes_there(one_gpu, monkeypatch):
    torch.set_float32_matmul_precision("highest")  # whatever tests before have left
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.6.0"))
    found = environment(torch.device("cuda"), compiles=True)
    assert found["device"] == "cuda (NVIDIA H100 80GB HBM3)"
    assert found["compute_capability"] == "9.0"
    assert found["compiler"] == "triton 3.6.0"
    assert found["float32_products"] == "highest"
    assert "compiler" not in environment(torch.device("cuda"), compiles=False)
    here = environment(CPU, compiles=False)
    assert found.keys() > here.keys()
    capability = torch.backends.cpu.get_cpu_capability()
    assert found["processor"] == f"{platform.machine()}, {capability}"


@pytest.mark.cuda
def test_every_version_that_decides_bits_on_a_gpu_is_known():
    found = environment(choose_device("cuda"), compiles=True)
    assert not any(word in value for value in found.values() for word in ("unknown", "None"))


@pytest.mark.cuda
def test_the_memory_of_a_gpu_is_in_segments_that_grow():
    program = (
        "import torch; from lm.machine.device import choose_device; "
        "torch.ones(1 << 22, device=choose_device('cuda')); "
        "print(all(s['is_expandable'] for s in torch.cuda.memory_snapshot()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_compiling_for_cuda_needs_the_c_compiler_of_triton(monkeypatch, tmp_path):
    device, gcc = torch.device("cuda"), tmp_path / "gcc"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert no_compiling(device) == "triton finds no C compiler (gcc or clang); install gcc"
    gcc.touch(mode=0o755)
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    assert no_compiling(device).startswith("triton finds no Python.h")
    (tmp_path / "Python.h").touch()
    assert no_compiling(device) is None
    monkeypatch.setenv("CC", "icc")  # triton then looks for no other
    assert no_compiling(device) == "triton finds no C compiler (icc); install gcc"


def test_the_number_of_threads_is_the_settings_or_torchs():
    threads, mode = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        make_deterministic(CPU, None)
        assert torch.get_num_threads() == threads
        make_deterministic(CPU, threads + 1)
        assert torch.get_num_threads() == threads + 1
        assert describe(CPU).startswith(f"cpu ({threads + 1} threads, ")
    finally:
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def test_processes_share_the_free_memory():
    alone, shared = free_memory_bytes(CPU), free_memory_bytes(CPU, 4)
    assert 4 * shared == pytest.approx(alone, rel=0.3)  # others take and free some meanwhile


@pytest.mark.parametrize(("reduction", "count"), [("sum", 3), ("tree", 4), ("sum", 1)])
def test_gradients_outlive_the_tensors_that_a_cuda_graph_overwrites(
    model_config, train_config, reduction, count
):
    """Each call of the stand-in writes into the tensors that its first call returned."""
    config = replace(train_config, batch_size=2 * count, reduction=reduction)
    state, written = new_state(model_config, config, CPU), []
    state.micro_batch_size = 2
    forward = partial(loss_of, dtype="float32", end_id=None)

    def plain(*arguments):
        return gradients_of(forward, *arguments)

    def graph(*arguments):
        loss, gradients = plain(*arguments)
        written[:] = written or [torch.empty_like(t) for t in (loss, *gradients)]
        for tensor, new in zip(written, (loss, *gradients), strict=True):
            tensor.copy_(new)
        return written[0], tuple(written[1:])

    def gradients(backward, overwrites, seed):
        x, y = get_batch(SPLIT.tokens, config.batch_size, 16, CPU, seed=seed)
        one = OneProcess(state.model, backward, reduction == "tree", overwrites)
        losses = forward_backward(state, config, x, y, one)
        return [losses, *(p.grad.clone() for p in state.model.parameters())]

    for seed in range(3):
        expected = gradients(plain, False, seed)
        got = gradients(graph, True, seed)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    overwritten = gradients(graph, False, seed)  # the control
    assert torch.equal(overwritten[-1], expected[-1]) == (count == 1)


def test_an_overflowing_gradient_stops_before_the_parameters_change(model_config, train_config):
    state, _ = run(model_config, train_config, steps=2)
    state.model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = weights(state)
    with pytest.raises(Diverged, match=r"gradient norm is (inf|nan) at step 3"):
        run(model_config, train_config, state=state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in weights(state).items())


def test_muon_and_adamw_follow_the_schedule_from_their_own_peaks(model_config, train_config):
    config = replace(train_config, optimizer="muon", lr=1e-2, muon_lr=3e-2, warmup_steps=4)
    state, records = run(model_config, config, steps=1)
    rates = {("momentum" in group): group["lr"] for group in state.optimizer.param_groups}
    assert rates == {True: pytest.approx(3e-2 / 4), False: pytest.approx(1e-2 / 4)}
    assert records[0]["learning_rate"] == pytest.approx(1e-2 / 4)


def test_dropout_differs_by_step_and_micro_batch_and_seed(model_config, train_config):
    """The same windows every time, so that only the dropped units can make the losses differ."""
    model_config = replace(model_config, dropout=0.5)
    constant = Split("train", np.zeros(100, dtype=np.uint16), 0)

    def losses(**changes):
        config = replace(train_config, lr=1e-12, warmup_steps=0, max_steps=3, **changes)
        state = new_state(model_config, replace(config, seed=0), CPU)  # the same weights
        return [record["train_loss"] for record in train(state, constant, config)]

    assert len(set(losses())) == 3
    assert losses() == losses()
    assert losses() != losses(seed=1)
    both, first = losses(batch_size=2, micro_batch_size=1), losses(batch_size=1)
    assert all(abs(a - b) > 1e-4 for a, b in zip(both, first, strict=True))


def test_gradient_checkpointing_is_switched_by_its_setting(model_config, train_config):
    for setting in (False, True):
        config = replace(train_config, gradient_checkpointing=setting)
        assert new_state(model_config, config, CPU).model.gradient_checkpointing is setting
