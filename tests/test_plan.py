"""The plan against independent counts: torch's own of products, parameters and saved tensors."""

import itertools
import json
import os
import platform
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import distributed
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import scale
from lm.base.errors import EnvironmentFault, InputError
from lm.base.params import load_params
from lm.base.run_id import run_folder
from lm.base.sections import read_section
from lm.base.settings import (
    Dtype,
    EvaluateConfig,
    ModelConfig,
    TrainConfig,
    TrainSection,
    share_of_batch,
)
from lm.data.splits import Split
from lm.evaluate.metrics import require_batch_fits
from lm.machine.device import autocast
from lm.machine.gauges import free_memory_bytes
from lm.machine.processes import Processes
from lm.machine.sharded_tensors import local
from lm.model.transformer import TransformerLM
from lm.plan import plan as planning
from lm.plan import timing
from lm.plan.__main__ import main
from lm.plan.footprint import (
    _optimizer,
    activations,
    communication,
    flops_per_token,
    parameters,
    peak_memory,
)
from lm.plan.page import table
from lm.plan.plan import (
    Plan,
    choose_dtype,
    compiling,
    explain_out_of_memory,
    largest_micro_batch,
    make_plan,
    require_room,
    require_room_for_processes,
)
from lm.plan.timing import announce, calibrate
from lm.train.loop import train
from lm.train.optim import OPTIMIZERS
from lm.train.parallel import Replicated, Sharded
from lm.train.state import new_state
from tests import test_run
from tests.project import ROOT
from tests.test_train import SPLIT, run, weights

run_settings = test_run.settings
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPES = [
    {},
    {"num_kv_heads": 1, "qk_norm": True, "ffn": "silu"},
    {"tie_embeddings": True, "norm_position": "post"},
    {"norm": "none", "position_embedding": "none"},
    {"dropout": 0.1},
    {"intra_document_masking": True},
]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_every_parameter_is_counted_in_its_part(model_config, changes):
    config = replace(model_config, **changes)
    of = {"token_embeddings": "embedding", "lm_head": "head", "attn": "attention",
          "ffn": "feed-forward", "ln1": "norms", "ln2": "norms", "ln_final": "norms",
          "q_norm": "norms", "k_norm": "norms"}  # fmt: skip
    found = dict.fromkeys(parameters(config), 0)
    for name, parameter in TransformerLM(config).named_parameters():
        words = name.split(".")
        part = next(of[word] for word in reversed(words) if word in of)
        found[part] += parameter.numel()
    assert parameters(config) == found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("changes", [{"dropout": 0.1}, {"dropout": 0.1, "ffn": "silu"}], ids=str)
def test_flops_are_what_torch_counts(model_config, train_config, changes, checkpointing):
    """With dropout attention is made of products that torch's counter knows, too."""
    config = replace(model_config, **changes)
    model = TransformerLM(config, checkpointing)
    ids = torch.zeros(3, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        loss = model.loss(ids, ids)
        in_forward = counter.get_total_flops()
        loss.backward()
    settings = replace(train_config, gradient_checkpointing=checkpointing)
    by_part = flops_per_token(config, settings, CPU)
    assert 48 * sum(map(sum, by_part.values())) == counter.get_total_flops()
    # the head makes its gradients in the forward pass
    assert 48 * (sum(f for f, _ in by_part.values()) + by_part["head"][1]) == in_forward


def test_the_convention_of_mfu_counts_the_same_products(model_config, train_config):
    config = replace(model_config, dropout=0.1)  # four products backward, as the convention has it
    model = TransformerLM(config)
    counted = sum(map(sum, flops_per_token(config, train_config, CPU).values()))
    assert counted + 6 * parameters(config)["norms"] == model.flops_per_token()


def test_compiled_blocks_of_queries_see_fewer_keys(model_config, train_config):
    config = replace(model_config, context_length=300)
    eager, blocks = (
        flops_per_token(config, replace(train_config, compile=compiled), CPU)["attention products"]
        for compiled in (False, True)
    )
    share = (128 * 128 + 128 * 256 + 44 * 300) / 300**2
    assert blocks[0] == pytest.approx(eager[0] * share)
    assert blocks[1] == pytest.approx(eager[1] * share)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_activations_are_what_autograd_saves(
    model_config, train_config, changes, dtype, checkpointing
):
    config = replace(model_config, context_length=64, d_model=64, num_heads=4, d_ff=160, **changes)
    model = TransformerLM(config, checkpointing).train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved, kept = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # or its place in memory would be another's
        return tensor

    ids = torch.randint(96, (8, 64))
    documents = model.documents(ids, 7)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast(CPU, dtype):
        features = model.features(ids, documents=documents)
    settings = replace(train_config, dtype=dtype, gradient_checkpointing=checkpointing)
    planned = activations(config, settings, 8)
    planned.pop("one block again", None)
    if checkpointing:  # the casts of weights live within a block
        planned.pop(f"weights in {dtype}", None)
    assert sum(planned.values()) == pytest.approx(sum(saved.values()), rel=0.06)
    assert features.requires_grad


THIRD = {"norm": "layernorm", "norm_position": "both", "ffn": "relu", "dtype": "float8",
         "reduction": "ring", "parallel": "pipeline", "optimizer": "sgd"}  # fmt: skip


@pytest.mark.parametrize("name", THIRD)
def test_a_third_choice_is_an_error_and_not_planned_as_the_second(model_config, train_config, name):
    train_config = replace(train_config, parallel="fsdp")
    planned = [model_config, train_config, CPU, 1, 0, 2]
    peak_memory(*planned)
    (config,) = (config for config in planned[:2] if hasattr(config, name))
    object.__setattr__(config, name, THIRD[name])  # past the check of types
    with pytest.raises((KeyError, AssertionError)):
        peak_memory(*planned)
    if name not in ("ffn", "dtype"):  # of which what is sent does not depend
        with pytest.raises((KeyError, AssertionError)):
            communication(model_config, train_config, 2, 1)


def test_an_optimizer_is_planned_by_the_numbers_of_its_own_entry(
    model_config, train_config, monkeypatch
):
    muon = OPTIMIZERS["muon"]
    numbers = {
        name: getattr(muon, name)
        for name in (f"{part}_bytes" for part in ("kept", "stacked", "exchanged", "sent"))
    }
    for name, times in (("double", 2), ("none", 0)):
        entry = replace(muon, **{key: times * number for key, number in numbers.items()})
        monkeypatch.setitem(OPTIMIZERS, name, entry)

    def needs(optimizer, parallel):
        config = replace(train_config, parallel=parallel, optimizer=optimizer)
        sent = communication(model_config, config, 2, 1).get(f"all-to-all of {optimizer}", 0)
        state, scratch = _optimizer(model_config, config, 2)
        return state, scratch, sent

    for parallel in ("none", "fsdp"):
        state, scratch, sent = needs("muon", parallel)
        assert needs("double", parallel) == (state, 2 * scratch, 2 * sent)
        assert needs("none", parallel) == (state, 0, 0)


def test_gradient_checkpointing_and_smaller_micro_batches_are_planned_smaller(
    model_config, train_config
):
    config = replace(model_config, context_length=512, num_layers=6)
    train_config = replace(train_config, compile=False)

    def total(windows=4, **changes):
        return sum(peak_memory(config, replace(train_config, **changes), CUDA, windows, 0).values())

    assert total(gradient_checkpointing=True) < 0.6 * total()
    assert total(windows=1) < 0.4 * total()


def test_the_largest_micro_batch_that_fits_divides_the_batch(model_config, train_config):
    config = replace(train_config, batch_size=12)

    def largest(free, **changes):
        return largest_micro_batch(model_config, replace(config, **changes), CUDA, free)

    needed = sum(peak_memory(model_config, config, CUDA, 12, 0).values())
    assert largest(round(needed * 2)) == 12
    assert largest(None) == 12
    assert largest(round(needed)) == 6  # a margin is kept
    assert largest(0) == 1
    assert largest(0, micro_batch_size=4) == 4
    assert 0 < free_memory_bytes(CPU) < 2**50


def test_more_tokens_than_gain_anything_are_not_computed_at_once(capsys):
    """GPT-2's size on a GPU of 80 GB, where neither memory nor a validation decides."""
    params = load_params(ROOT / "presets" / "gpt2-124m.yaml", ["train.compile=false"])
    config = read_section(TrainConfig, params, "train")
    model = read_section(ModelConfig, params, "model", vocab_size=50_257)

    def largest(free, **changes):
        return largest_micro_batch(model, replace(config, **changes), CUDA, free)

    assert [largest(free) for free in (None, 140 * 10**9, 80 * 10**9)] == [64] * 3
    assert largest(80 * 10**9, batch_size=96) == 48  # 96 is not divisible by 64
    assert largest(20 * 10**9) == 16
    assert largest(80 * 10**9, micro_batch_size=128) == 128
    assert largest_micro_batch(replace(model, context_length=2**17), config, CUDA, None) == 1
    for compiled in (False, True):
        plan = Plan(model, replace(config, compile=compiled), CUDA, 64, 0)
        assert sum(plan.memory.values()) < 36e9
        assert plan.memory.get("validation's logits", 0) < 0.2e9
        announce(plan, plan.config)
    assert "do not fit" not in capsys.readouterr().out  # it is not memory that keeps it from 512


def out_of_memory_above(monkeypatch, windows):
    """Fail as torch does when more windows than these come in at once."""
    real = TransformerLM.loss

    def loss(self, ids, *rest):
        if len(ids) > windows:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return real(self, ids, *rest)

    monkeypatch.setattr(TransformerLM, "loss", loss)


def test_out_of_memory_halves_the_micro_batch_and_repeats_the_step(
    model_config, train_config, monkeypatch, capsys
):
    model_config = replace(model_config, dropout=0.1)
    expected, _ = run(model_config, replace(train_config, micro_batch_size=1))
    out_of_memory_above(monkeypatch, 1)
    state, records = run(model_config, train_config)
    assert [record["step"] for record in records] == list(range(1, 21))
    assert state.micro_batch_size == 1
    assert all(
        torch.equal(tensor, weights(state)[key]) for key, tensor in weights(expected).items()
    )
    told = capsys.readouterr().out.splitlines()
    assert told[-2:] == [
        "Out of memory on cpu with micro-batch size 4: using 2 from now on, repeating step 1",
        "Out of memory on cpu with micro-batch size 2: using 1 from now on, repeating step 1",
    ]
    with pytest.raises(
        EnvironmentFault, match=r"with micro-batch size 2; try train.micro_batch_size: 1 "
    ):
        run(model_config, replace(train_config, micro_batch_size=2))
    out_of_memory_above(monkeypatch, 0)
    with pytest.raises(EnvironmentFault, match="with micro-batch size 1; try a smaller model or"):
        run(model_config, train_config)


def test_a_resumed_run_keeps_its_micro_batches(run_settings, tmp_path, capsys):
    """Begun with less memory: its size is recorded, and kept when there is more again."""
    with pytest.MonkeyPatch.context() as patch:
        out_of_memory_above(patch, 2)
        assert test_run.go(run_settings, tmp_path / "a", until=7) is None
    assert test_run.go(run_settings, tmp_path / "a")["micro_batch_size"] == 2
    assert "Resumed at step 6" in capsys.readouterr().out
    provenance = json.loads((tmp_path / "a/models/model/provenance.json").read_text())
    assert provenance["micro_batch_sizes"] == {"1": 2}
    with pytest.MonkeyPatch.context() as patch:
        out_of_memory_above(patch, 2)
        test_run.go(run_settings, tmp_path / "b")
    for name in ("model/model.safetensors", "checkpoints/last.safetensors"):
        a, b = ((tmp_path / run / "models" / name).read_bytes() for run in "ab")
        assert a == b
    test_run.go(run_settings, tmp_path / "c")  # the same run, with all the memory that it wants
    whole = json.loads((tmp_path / "c/models/model/provenance.json").read_text())
    assert whole["micro_batch_sizes"] == {"1": 4}
    assert run_folder(tmp_path, whole) == run_folder(tmp_path, provenance)


def test_compiling_is_decided_by_the_length_of_the_run(model_config, train_config, monkeypatch):
    monkeypatch.setattr(planning, "no_compiling", lambda device: None)
    config = TrainSection(**vars(train_config) | {"compile": "auto"})
    assert compiling(model_config, config, CPU)[0] is False
    decided, why = compiling(model_config, replace(config, max_steps=2**30), CPU)
    assert decided
    assert "at least 2 times its cost" in why
    assert compiling(model_config, replace(config, compile=True), CPU)[0] is True
    assert compiling(model_config, config, torch.device("mps"))[0] is False
    monkeypatch.setattr(planning, "no_compiling", lambda device: "no C++ compiler found")
    assert compiling(model_config, replace(config, max_steps=2**30), CPU) == (
        False,
        "no C++ compiler found to compile",
    )


@pytest.mark.parametrize(
    ("device", "bf16", "amx", "capability", "width", "dtype"),
    [
        ("cpu", False, False, None, 128, "float32"),
        ("cpu", True, False, None, 128, "bfloat16"),
        ("cpu", False, True, None, 128, "bfloat16"),
        ("cpu", True, True, None, 124, "float32"),
        ("cuda", False, False, (7, 5), 128, "float32"),
        ("cuda", False, False, (8, 0), 128, "bfloat16"),
        ("cuda", False, False, (12, 0), 32, "bfloat16"),
        ("mps", True, True, None, 128, "float32"),
    ],
)
def test_the_dtype_is_what_the_device_multiplies_natively(
    smoke_params, model_config, monkeypatch, device, bf16, amx, capability, width, dtype
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    smoke_params["train"]["dtype"] = "auto"
    asked = read_section(TrainSection, smoke_params, "train")
    model = replace(model_config, d_model=width)
    assert choose_dtype(model, asked, torch.device(device))[0] == dtype
    for other in get_args(Dtype):
        assert choose_dtype(model, replace(asked, dtype=other), torch.device(device))[0] == other


def test_a_plan_leaves_nothing_open_and_tells_what_it_chose(smoke_params, model_config, capsys):
    smoke_params["train"] |= {"dtype": "auto", "compile": "auto"}
    asked = read_section(TrainSection, smoke_params, "train")
    plan = make_plan(model_config, asked, CPU)
    smoke_params["train"] |= {"dtype": plan.config.dtype, "compile": plan.config.compile}
    assert plan.config == read_section(TrainConfig, smoke_params, "train")
    assert plan.config.compile in (True, False)
    timing.announce(plan, asked)
    assert f"Plan: {plan.config.dtype}: " in capsys.readouterr().out
    timing.announce(plan, plan.config)
    assert f"Plan: {plan.config.dtype}" not in capsys.readouterr().out


def test_a_calibration_disturbs_no_training(model_config, train_config):
    model_config = replace(model_config, dropout=0.1)
    straight, _ = run(model_config, train_config)
    state = new_state(model_config, train_config, CPU)
    for count, _ in enumerate(train(state, SPLIT, train_config), start=1):
        if count == 5:
            before = torch.get_rng_state()
            config = replace(train_config, compile=False)
            assert 0 < calibrate(Plan(model_config, config, CPU, 4, 0)) < 60
            assert torch.equal(before, torch.get_rng_state())
    assert all(
        torch.equal(tensor, weights(state)[key]) for key, tensor in weights(straight).items()
    )


# net of what the compiler takes, each of these is a training of three steps in its own process
PEAK = """
import sys, numpy as np, torch
from dataclasses import replace
from pathlib import Path
from lm.base.params import load_params
from lm.base.sections import read_section
from lm.machine.device import prepare
from lm.machine.gauges import peak_memory_bytes
from lm.model.transformer import ModelConfig
from lm.plan.plan import make_plan
from lm.data.splits import Split
from lm.base.settings import TrainSection
from lm.train.loop import train
from lm.train.state import new_state
device = torch.device("cpu")
prepare(device, 1)
params = load_params(Path("params.yaml"), sys.argv[2:])
model = read_section(ModelConfig, params, "model", vocab_size=int(sys.argv[1]))
plan = make_plan(model, replace(read_section(TrainSection, params, "train"), max_steps=3), device)
state = new_state(model, plan.config, device)
ids = np.random.default_rng(0).integers(model.vocab_size, size=9999, dtype=np.uint32)
for _ in train(state, Split("train", ids, 0), plan.config):
    pass
print(peak_memory_bytes(device) / sum(plan.memory.values()))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its heap is what is planned with")
@pytest.mark.parametrize(
    ("vocab_size", "changes"),
    [
        (2048, ["train.batch_size=4"]),
        (10_000, ["model.d_model=256", "train.batch_size=2", "train.optimizer=adamw"]),
        (512, ["model.num_layers=12", "train.batch_size=8", "train.gradient_checkpointing=true"]),
    ],
    ids=["default", "large vocabulary", "checkpointing"],
)
def test_the_planned_memory_is_within_a_tenth_of_the_peak(vocab_size, changes):
    overrides = ["train.warmup_steps=0", "train.dtype=float32", "train.compile=false", *changes]
    command = [sys.executable, "-c", PEAK, str(vocab_size), *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(1, abs=0.1)


def test_the_command_tells_memory_time_and_cost(project):
    project.set("train.gradient_checkpointing", True)
    done = project.warm("lm.plan", "-S", "train.max_steps=40", "--price", "2")
    assert done["status"] == 0, done["err"]
    expected = ("| embedding | 9,600 |", "| all | 39,840 |", "| optimizer state | 0.3 |",
                "gradient_checkpointing: false ", "40 steps, ", "EUR at 2 EUR an hour")  # fmt: skip
    for words in expected:
        assert words in done["out"], done["out"]
    done = project.warm("lm.plan", "-S", "train.compile=maybe")
    assert done["status"] == 2
    assert "train.compile = maybe: must be one of auto, true, false" in done["err"]


def test_processes_share_the_batch_evenly(train_config):
    config = replace(train_config, batch_size=96, parallel="ddp")
    assert [share_of_batch(config, n) for n in (1, 2, 96)] == [96, 48, 1]
    assert share_of_batch(replace(config, micro_batch_size=12), 8) == 12
    tree = replace(config, batch_size=128, micro_batch_size=8, reduction="tree")
    assert share_of_batch(tree, 16) == 8
    assert share_of_batch(replace(config, parallel="none"), 1) == 96


@pytest.mark.parametrize(
    ("changes", "num_processes", "message"),
    [
        ({"parallel": "none"}, 2, "train.parallel = none, but there are 2 processes; use ddp or"),
        ({}, 5, "train.batch_size = 96 is not a multiple of 5 processes"),
        (
            {"micro_batch_size": 8},
            5,
            "= 96 is not a multiple of train.micro_batch_size = 8 times 5",
        ),
        ({"parallel": "fsdp", "dtype": "float16"}, 1, "train.dtype = float16; use bfloat16"),
        ({"reduction": "tree"}, 1, "train.reduction = tree needs train.micro_batch_size"),
        ({"reduction": "tree", "micro_batch_size": 8}, 4, "batch_size = 96 is not 1, 2, 4, 8, ..."),
        (
            {"reduction": "tree", "micro_batch_size": 12},
            3,
            "train.micro_batch_size = 12 times 3 pr",
        ),
    ],
    ids=str,
)
def test_settings_that_cannot_be_shared_are_refused(train_config, changes, num_processes, message):
    config = replace(train_config, **{"batch_size": 96, "parallel": "ddp"} | changes)
    with pytest.raises(InputError) as refused:
        share_of_batch(config, num_processes)
    assert message in str(refused.value)


@pytest.fixture
def one_of_four():
    """The first of four processes, whose messages go nowhere."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    distributed.destroy_process_group()


# of a share, or of four parts: how much goes to other processes
SENT = {"_allgather_base_": 3, "_reduce_scatter_base_": 3, "alltoall_base_": 3 / 4}


class Sent(TorchDispatchMode):
    """Counts the bytes that one of four processes would send of what torch is given to send."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        library, name = function._schema.name.split("::")
        if library == "c10d":
            tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            size = min(tensor.nbytes for tensor in tensors)
            self.bytes[name] = self.bytes.get(name, 0) + SENT[name] * size
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {"parallel": "fsdp"},
        {"parallel": "fsdp", "gradient_checkpointing": True},
        {"parallel": "fsdp", "reduction": "tree"},
        {"parallel": "fsdp", "optimizer": "muon"},
        {"parallel": "ddp", "reduction": "tree"},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_processes_hold_and_send_what_is_planned(
    model_config, train_config, one_of_four, changes, tied, micro_batches
):
    model_config = replace(model_config, tie_embeddings=tied)
    sizes = {"batch_size": 4 * micro_batches, "micro_batch_size": 1}
    config = replace(train_config, **{"optimizer": "adamw", "compile": False} | sizes | changes)
    state = new_state(model_config, config, CPU, Processes(0, 4))
    held = sum(local(parameter).nbytes for parameter in state.model.parameters())
    assert peak_memory(model_config, config, CUDA, 1, 0, 4)["weights"] == held
    tree = config.reduction == "tree"

    def loss_of(model, x, y):
        return model.loss(x, y)

    if config.parallel == "ddp":
        backward = Replicated(state.model, loss_of, state.processes, tree)
    else:
        backward = Sharded(state.model, loss_of, tree)
    ids, one = torch.zeros(1, 16, dtype=torch.int64), torch.ones(())
    with Sent() as sent:
        for number in range(micro_batches):
            backward.add(ids, ids, one, number == micro_batches - 1)
        state.optimizer.step()
    planned = communication(model_config, config, 4, micro_batches)
    assert sorted(planned.values()) == sorted(sent.bytes.values())


@pytest.mark.parametrize(
    ("micro_batches", "changes"),
    [
        (1, {}),
        (4, {}),
        (4, {"reduction": "tree"}),
        (1, {"gradient_checkpointing": True}),
        (1, {"dtype": "bfloat16"}),
        (1, {"optimizer": "muon"}),
    ],
    ids=str,
)
def test_planned_memory_of_fsdp_is_what_torch_holds_at_once(
    model_config, train_config, one_of_four, micro_batches, changes
):
    """Of the tensors that are alive, whatever a heap makes of it: so on a GPU."""
    sizes = {"d_model": 256, "d_ff": 688, "num_layers": 4, "context_length": 64}
    model_config = replace(model_config, **sizes)
    fixed = {"optimizer": "adamw", "compile": False, "parallel": "fsdp", "micro_batch_size": 2}
    config = replace(train_config, batch_size=8 * micro_batches, **(fixed | changes))
    state = new_state(model_config, config, CPU, Processes(0, 4))

    def loss_of(model, x, y):
        with autocast(CPU, config.dtype):
            return model.loss(x, y)

    backward = Sharded(state.model, loss_of, config.reduction == "tree")
    ids, one = torch.zeros(2, 64, dtype=torch.int64), torch.ones(())

    def update():
        state.optimizer.zero_grad(set_to_none=True)
        for number in range(micro_batches):
            backward.add(ids, ids, one, number == micro_batches - 1)
        state.optimizer.step()

    update()  # makes the optimizer's state
    state.optimizer.zero_grad(set_to_none=True)
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        update()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes_of_size = [event.nbytes() for event in events if event.name() == "[memory]"]
    planned = peak_memory(model_config, config, CUDA, 2, 0, 4)
    held = planned["weights"] + planned["optimizer state"]
    most = held + max(itertools.accumulate(changes_of_size))
    assert 0.8 < most / sum(planned.values()) < 1.02


def test_what_ddp_a_tree_and_muon_send_by_hand(model_config, train_config):
    model = replace(model_config, d_model=8, d_ff=24, num_heads=2, num_layers=3, vocab_size=50)
    numbers = 2 * 50 * 8 + 3 * (4 * 8 * 8 + 3 * 8 * 24 + 2 * 8) + 8

    def sent(processes, micro_batches=1, **changes):
        return communication(model, replace(train_config, **changes), processes, micro_batches)

    assert sent(1, parallel="ddp") == {"all-reduce of gradients": 0}
    # four times a fifth of the numbers, first as sums on their way and then as results
    once = pytest.approx(4 * 4 * numbers / 5)
    assert sent(5, parallel="ddp") == pytest.approx(
        {"all-reduce of gradients": 2 * 4 * 4 * numbers / 5}
    )
    tree = sent(5, micro_batches=4, parallel="ddp", reduction="tree")
    assert tree == {"all-to-all of gradients": once, "all-gather of gradients": once}
    tree = sent(5, micro_batches=4, parallel="fsdp", reduction="tree", optimizer="muon")
    assert tree["all-to-all of gradients"] == pytest.approx(4 * 4 * 4 * numbers / 5)
    # 12, 6 and 3 matrices of a shape are 3, 2 and 1 rounds, in each of which a process sends four
    # fifths of a matrix, in float32 as rows of all and in bfloat16 of the one that it has had
    numbers = 3 * 64 + 2 * 192 + 1 * 192
    assert tree["all-to-all of muon"] == pytest.approx(4 / 5 * (4 + 2) * numbers)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_shares_of_all_processes_are_the_whole(model_config, train_config, optimizer):
    def held(parallel, processes):
        config = replace(train_config, batch_size=64, optimizer=optimizer, parallel=parallel)
        return peak_memory(model_config, config, CUDA, 1, 0, processes)

    whole = held("none", 1)
    for part in ("weights", "optimizer state"):
        assert held("ddp", 16)[part] == whole[part]
        assert 16 * held("fsdp", 16)[part] == whole[part]
    assert sum(held("fsdp", 16).values()) < sum(held("ddp", 16).values())


def test_gradients_of_several_micro_batches_are_held_whole_in_buckets_or_in_shares(
    model_config, train_config
):
    config = replace(train_config, batch_size=64, optimizer="adamw")
    model = replace(model_config, num_layers=20, vocab_size=32, context_length=64)
    sizes = parameters(model)
    whole, vocabulary = 4 * sum(sizes.values()), 4 * sizes["head"]
    block = (whole - 2 * vocabulary - 4 * model.d_model) / 20

    def held(windows, **changes):
        return peak_memory(model, replace(config, **changes), CUDA, windows, 0, 8)["gradients"]

    # at the start of the backward pass: what was before, and the head's
    assert held(8, parallel="ddp") == held(1, parallel="ddp") == whole + vocabulary
    tree = {"reduction": "tree", "micro_batch_size": 2}  # four micro-batches: two levels
    assert held(2, parallel="ddp", **tree) == 3 * whole + vocabulary
    # under fsdp also a block's, and those being sent
    sent = vocabulary + 2 * block
    assert held(1, parallel="fsdp") == pytest.approx(whole + sent)
    assert held(2, parallel="fsdp", **tree) == pytest.approx(2 * whole / 8 + sent)


def test_a_process_plans_with_its_share_of_batch_and_memory(
    model_config, train_config, monkeypatch
):
    model_config = replace(model_config, context_length=4096)
    config = replace(train_config, batch_size=24, parallel="ddp", compile=False)
    needed = sum(peak_memory(model_config, config, CPU, 6, 0, 4).values())
    monkeypatch.setattr(
        planning, "free_memory_bytes", lambda device, n=1: round(4 * needed / 0.9 + 4) // n
    )
    plan = make_plan(model_config, config, CPU, 4)
    assert (plan.share, plan.micro_batch_size) == (6, 6)
    monkeypatch.setattr(planning, "free_memory_bytes", lambda device, n=1: round(4 * needed) // n)
    assert make_plan(model_config, config, CPU, 4).micro_batch_size == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # the two others are on another machine
    assert make_plan(model_config, config, CPU, 4).micro_batch_size == 6
    with pytest.raises(InputError, match="24 is not a multiple of 5 processes"):
        make_plan(model_config, config, CPU, 5)


def test_processes_divide_the_time_and_a_network_may_take_it_back(model_config, train_config):
    config = replace(train_config, batch_size=8, max_steps=100, parallel="ddp", eval_interval=100)
    plan = Plan(model_config, config, CPU, 2, 0, 4)
    page = table(plan, 0.5, None, bandwidth=sum(plan.communication.values()))
    assert "memory of each of 4 processes, ddp, float32, micro-batch size 2" in page
    assert "Sending takes 1.000 s a step" in page
    assert "0.500 s a step: 1:4" in page  # as long as sending takes, and a validation
    assert plan.flops == replace(plan, num_processes=1).flops
    assert "not timed" in table(plan, None, None)


def test_a_step_too_large_for_this_machine_is_not_tried(model_config, train_config, monkeypatch):
    plan = Plan(model_config, train_config, CPU, 1, 0)
    monkeypatch.setattr(planning, "free_memory_bytes", lambda device, n=1: 1000)
    assert calibrate(plan) is None
    monkeypatch.undo()
    monkeypatch.setattr(timing, "LONGEST_WINDOW_S", 0.0)
    assert calibrate(plan) is None


def test_what_surely_does_not_fit_is_refused_with_what_would(model_config, train_config):
    require_room(make_plan(model_config, train_config, CPU))
    plan = make_plan(model_config, replace(train_config, batch_size=3 * 2**29), CPU)
    plan = replace(plan, model=replace(model_config, context_length=2**16))
    remedy = r"train.micro_batch_size: 1, train.batch_size: \d+ would fit$"
    with pytest.raises(EnvironmentFault, match=rf"MB of memory, [\d,]+ MB are free; {remedy}"):
        require_room(plan)
    with pytest.raises(EnvironmentFault, match=r"^runtime.num_processes = 1000000: .*; use fewer$"):
        require_room_for_processes(1_000_000)


def test_out_of_memory_is_told_with_what_was_planned(model_config, train_config):
    model_config = replace(model_config, context_length=4096)
    plan = Plan(model_config, replace(train_config, batch_size=4), CPU, 4, 0)
    line = (
        r"^out of memory: training \d+,\d+ parameters with micro-batch size 4 takes about "
        r"[\d,]+ MB; try train.micro_batch_size: 2$"
    )
    with pytest.raises(EnvironmentFault, match=line), explain_out_of_memory(plan):
        torch.empty(1 << 60)
    with pytest.raises(RuntimeError, match="^another$"), explain_out_of_memory(plan):
        raise RuntimeError("another")


@pytest.mark.skipif(sys.platform != "linux", reason="where it tells what a process holds")
def test_a_limit_of_the_process_counts_as_little_memory():
    before = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (held + (300 << 20), before[1]))  # ulimit -v
    try:
        assert free_memory_bytes(CPU) < 310 << 20
        assert free_memory_bytes(CPU, 2) > 200 << 20  # each process has a limit of its own
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_batch_that_surely_does_not_fit_is_refused_before_it_is_computed(
    model_config, smoke_params
):
    smoke_params["evaluate"] |= {"batch_size": 2**31 - 1, "stride": 1}
    config = read_section(EvaluateConfig, smoke_params, "evaluate")
    valid = Split("valid", np.broadcast_to(np.uint16(0), 10**9), 0)
    line = (
        "evaluate.batch_size = 2147483647: the features of 1,000,000,000 windows take "
        ".* MB of memory"
    )
    with pytest.raises(EnvironmentFault, match=line):
        require_batch_fits(config, model_config, valid, CPU)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-S", "runtime.num_processes=2"], "train.parallel = none, but there are 2 processes"),
        (["-S", "train.parallel=ddp", "-S", "runtime.num_processes=3"], "multiple of 3 processes"),
        (["--bandwidth", "0"], "--bandwidth 0.0: must be > 0"),
    ],
    ids=str,
)
def test_the_command_refuses_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--params", str(ROOT / "presets" / "smoke.yaml"), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_tables_of_the_page_are_what_the_benchmark_prints(capsys):
    page = (ROOT / "docs" / "SCALE.md").read_text()
    scale.main()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) > 40
    assert not [line for line in printed if line not in page]


def test_the_slurm_script_parses_and_starts_the_stage():
    script = ROOT / "docs" / "slurm" / "train.sbatch"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert " -m stages.train\n" in script.read_text()
