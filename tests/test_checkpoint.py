"""Checkpoints: exact, safe to open, whole or absent, and one writer at a time."""

import copy
import io
import json
import math
import os
import pickle
import resource
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lm.base.errors import EnvironmentFault, InputError
from lm.base.params import load_params
from lm.base.sections import read_section
from lm.base.settings import TrainConfig
from lm.data.tokenizer import byte_tokenizer
from lm.model.kernels import cross_entropy
from lm.model.model_folder import load_model, save_model
from lm.model.transformer import ModelConfig, TransformerLM
from lm.runs.checkpoint import load_checkpoint, read_extra, save_checkpoint
from lm.runs.manifest import commit, verify
from lm.train.optim import OPTIMIZERS, AdamW
from tests.project import SMOKE, change


def trained(model_config, train_config, steps=3, optimizer="adamw", seed=0):
    """A model and its optimizer after a few steps."""
    torch.manual_seed(seed)
    model = TransformerLM(model_config)
    optimizer = OPTIMIZERS[optimizer].make(model, replace(train_config, optimizer=optimizer))
    for _ in range(steps):
        ids = torch.randint(96, (2, 17))
        optimizer.zero_grad()
        cross_entropy(model(ids[:, :-1]), ids[:, 1:]).backward()
        optimizer.step()
    return model, optimizer


def assert_same(a, b):
    """Model and optimizer hold the same bits, and values of the same types."""
    assert_identical(dict(a[0].state_dict()), dict(b[0].state_dict()), "model")
    assert_identical(a[1].state_dict(), b[1].state_dict(), "optimizer")


def assert_identical(a, b, where):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_identical(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_identical(one, other, f"{where}.{i}")
    elif isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_restores_every_bit(model_config, train_config, tmp_path, optimizer, tied):
    config = replace(model_config, tie_embeddings=tied)
    saved = trained(config, train_config, optimizer=optimizer)
    file = io.BytesIO()
    save_checkpoint(*saved, 3, file)
    save_checkpoint(*saved, 3, tmp_path / "a.safetensors", {"note": 1})
    for source in (io.BytesIO(file.getvalue()), tmp_path / "a.safetensors"):
        fresh = trained(config, train_config, steps=0, optimizer=optimizer, seed=9)
        assert load_checkpoint(source, *fresh) == 3
        assert_same(saved, fresh)
    assert read_extra(tmp_path / "a.safetensors") == {"note": 1, "iteration": 3}


class Counting(torch.optim.Optimizer):
    """As a student writes it: the step is an int, the rate a number of NumPy's."""

    def __init__(self, params, lr, betas=(0.9, 0.95)):
        super().__init__(params, {"lr": lr, "betas": betas, "t0": 3, "named": {"a": 1}})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["t"] = state.get("t", 0) + 1
                state["decay"] = np.float64(0.5 ** state["t"])
                state["m"] = state.get("m", 0) + p.grad
                p.data -= group["lr"] * state["m"] / math.sqrt(state["t"])


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        lambda params: torch.optim.SGD(params, lr=1),
        lambda params: torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0),
        lambda params: torch.optim.AdamW(params, lr=torch.tensor(1e-3), fused=True),
        lambda params: torch.optim.AdamW(params, lr=1e-3, amsgrad=True, fused=True),
        lambda params: torch.optim.Adagrad(params),
        lambda params: torch.optim.RMSprop(params, momentum=0.5, centered=True),
        lambda params: torch.optim.Adafactor(params),
        lambda params: AdamW(params, lr=np.float64(1e-3)),
        lambda params: AdamW(params, fused=False),
        lambda params: Counting(params, np.float32(0.1)),
    ],
    ids=[
        "momentum",
        "sgd",
        "adamw",
        "tensor-lr",
        "amsgrad",
        "adagrad",
        "rmsprop",
        "adafactor",
        "numpy-lr",
        "loops",
        "counting",
    ],
)
def test_state_dict_is_the_same_before_and_after_types_included(
    model_config, tmp_path, make_optimizer
):
    """As the test of the course CS336 compares them: by == of the whole dictionaries."""

    def make(steps):
        torch.manual_seed(0)
        model = TransformerLM(model_config)
        optimizer = make_optimizer(model.parameters())
        for step in range(1, steps + 1):
            for group in optimizer.param_groups:  # a schedule
                group["lr"] = group["lr"] * 0.5**step
            optimizer.zero_grad()
            cross_entropy(model(torch.ones(1, 4).long()), torch.ones(1, 4).long()).backward()
            optimizer.step()
        return model, optimizer

    for steps in (0, 2):
        saved, file = make(steps), io.BytesIO()
        save_checkpoint(*saved, steps, tmp_path / "a.safetensors")
        save_checkpoint(*saved, steps, file)
        for source in (tmp_path / "a.safetensors", io.BytesIO(file.getvalue())):
            fresh = make(0)
            if steps and isinstance(fresh[1], Counting):
                for group in fresh[1].param_groups:
                    group["lr"] = np.float32(7)
            assert type(load_checkpoint(source, *fresh)) is int
            if isinstance(fresh[1], Counting):
                for state in saved[1].state.values():
                    state["decay"] = float(state["decay"])  # nothing says what it was
            assert_same(saved, fresh)


def test_bytes_depend_on_what_is_saved_alone(model_config, train_config, tmp_path):
    saved, files = trained(model_config, train_config), []
    for name in ("a", "a-much-longer-name", "c/d"):
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_checkpoint(*saved, 3, path, {"x": 1, "y": [1, 2]})
        files.append(path.read_bytes())
    assert files[0] == files[1] == files[2]


def test_a_file_has_the_permissions_of_the_user(model, tmp_path, train_config):
    optimizer = OPTIMIZERS["adamw"].make(model, train_config)
    save_checkpoint(model, optimizer, 0, tmp_path / "a.safetensors")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


class Bomb:
    """What a hostile pickle does when it is opened."""

    def __reduce__(self):
        return os.mkdir, ("bombed",)


def test_a_pickle_in_place_of_a_checkpoint_is_refused_and_not_run(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.safetensors").write_bytes(pickle.dumps(Bomb()))
    torch.save({"model": Bomb()}, tmp_path / "torch.safetensors")
    for name in ("plain.safetensors", "torch.safetensors"):
        with pytest.raises(InputError, match="not a safetensors file"):
            load_checkpoint(tmp_path / name, model)
        with pytest.raises(InputError, match="not a safetensors file"):
            load_checkpoint(io.BytesIO((tmp_path / name).read_bytes()), model)
    assert not (tmp_path / "bombed").exists()


def test_a_foreign_checkpoint_is_refused_and_changes_nothing(
    model_config, train_config, tmp_path, model
):
    saved = trained(model_config, train_config)
    path = tmp_path / "a.safetensors"
    save_checkpoint(*saved, 3, path)
    other = trained(replace(model_config, d_ff=128), train_config, steps=0)
    before = {key: value.clone() for key, value in other[0].state_dict().items()}
    message = r"another model: layers.0.ffn.w1.weight is \(64, 32\), expected \(128, 32\)"
    with pytest.raises(InputError, match=message):
        load_checkpoint(path, *other)
    assert all(torch.equal(before[key], value) for key, value in other[0].state_dict().items())
    muon = trained(model_config, train_config, steps=0, optimizer="muon", seed=5)
    before = {key: value.clone() for key, value in muon[0].state_dict().items()}
    with pytest.raises(InputError, match="another optimizer"):
        load_checkpoint(path, *muon)
    assert all(torch.equal(before[key], value) for key, value in muon[0].state_dict().items())
    save_model(model, byte_tokenizer(), tmp_path / "model")
    with pytest.raises(InputError, match="holds tensors but no checkpoint"):
        load_checkpoint(tmp_path / "model" / "model.safetensors", model)
    with pytest.raises(InputError, match="no such file"):
        load_checkpoint(tmp_path / "missing", model)


def rewritten(path, change):
    """Change what a checkpoint holds, (tensors, header), and commit it, so that its hash agrees."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["checkpoint"])
    header = change(tensors, header) or header
    save_file(tensors, path, {"checkpoint": json.dumps(header)})
    commit(path)


def as_folder(path):
    """The checkpoint as several processes write it."""
    folder = path.with_suffix("")
    folder.mkdir()
    with safe_open(path, framework="pt") as file:
        (folder / "header.json").write_text(file.metadata()["checkpoint"])
    save_file(load_file(path), folder / "shard-00001-model-00001-of-00001.safetensors")
    return folder


def drop(*ends):
    """Leave out the tensors whose names begin or end so."""

    def do(tensors, header):
        for key in [k for k in tensors if k.startswith(ends) or k.endswith(ends)]:
            del tensors[key]

    return do


def put(key, change):
    """Change a tensor, or add one."""

    def do(tensors, header):
        tensors[key] = change(tensors.get(key))

    return do


def say(place, value):
    """Change, or with None delete, a value of the header."""

    def do(tensors, header):
        change(header, place.split("/"), value)

    return do


def spoilt(value, index=0):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[index] = value
        return tensor

    return change


NAN, INF = float("nan"), float("inf")
MOMENT, COUNTER, WEIGHT = "optimizer.4.exp_avg", "optimizer.4.step", "model.lm_head.weight"
IMPOSSIBLE = [
    (drop(MOMENT), "another optimizer: optimizer.4.exp_avg: missing"),
    (drop(COUNTER), "another optimizer: optimizer.4.step: missing"),
    (drop("optimizer.4."),
     "another optimizer: no state of parameter 4"),
    (drop(".exp_avg_sq"),
     "optimizer.0.exp_avg_sq: missing"),
    (put("optimizer.4.more", lambda _: torch.zeros(3)), "optimizer.4.more: one too many"),
    (put("optimizer.99.exp_avg", lambda _: torch.zeros(3)), "optimizer.99.exp_avg: this one has"),
    (put("optimizer.x.exp_avg", lambda _: torch.zeros(3)), "optimizer.x.exp_avg: this one has"),
    (put("optimizer.4", lambda _: torch.zeros(3)), "another optimizer: optimizer.4: this one has"),
    (put("optimizer.04.exp_avg", lambda _: torch.zeros(3)), "optimizer.04.exp_avg: this one has"),
    (put("something", lambda _: torch.zeros(3)), "something belongs neither to a model nor"),
    (put(MOMENT, lambda t: t.T.contiguous()), r"is \(32, 64\) float32, expected \(64, 32\)"),
    (put(MOMENT, lambda t: t[:1].clone()), r"optimizer.4.exp_avg is \(1, 32\) float32, expected"),
    (put(MOMENT, lambda t: t.double()), "float64, expected .* float32"),
    (put(MOMENT, lambda t: t.int()), "int32, expected .* float32"),
    (put(MOMENT, spoilt(NAN)), "optimizer.4.exp_avg: 1 of 2048 values are not finite"),
    (put(MOMENT, spoilt(INF)), "optimizer.4.exp_avg: 1 of 2048 values are not finite"),
    (put(COUNTER, lambda t: torch.full((2,), 3.0)), r"step is \(2,\) float32, expected"),
    (put(COUNTER, lambda t: t - 9), "optimizer.4.step is negative"),
    (put(COUNTER, lambda t: t * NAN), "optimizer.4.step: 1 of 1 values are not finite"),
    (drop(WEIGHT), "another model: lm_head.weight is nothing"),
    (put("model.more", lambda _: torch.zeros(3)), r"model: more is \(3,\), expected nothing"),
    (put(WEIGHT, lambda t: t.long()), "lm_head.weight is int64, expected float32"),
    (put(WEIGHT, lambda t: t.bfloat16()), "lm_head.weight is bfloat16, expected float32"),
    (put(WEIGHT, spoilt(-INF, -1)), "model.lm_head.weight: 1 of 3072 values are not finite"),
    (lambda t, h: [h], "damaged header: holds no keys"),
    (lambda t, h: "text", "damaged header: holds no keys"),
    (say("optimizer", None), "damaged header: no optimizer"),
    (say("optimizer", []), r"header.optimizer = \[\] is a list, wanted keys and values"),
    (say("optimizer/values", None), "missing key header.optimizer.values"),
    (say("optimizer/values", {"4": 1}), "header.optimizer.values.4 = 1 is a number, wanted keys"),
    (say("optimizer/values", {"4": {"t": 1}}), "expected only tensors in its state"),
    (say("optimizer/values", {"x": {"t": 1}}), "optimizer.x.t: this one has"),
    (say("optimizer/values", {"4.x": {"t": 1}}), "4.x is not the number of a parameter"),
    (say("optimizer/param_groups", {}), "param_groups = {} is a dict, wanted a list"),
    (say("optimizer/param_groups", [1, 2]), "wanted keys and values"),
    (say("optimizer/param_groups", []), "another optimizer: 0 parameter groups, expected 2"),
    (say("optimizer/param_groups/0/eps", None), "another optimizer: group 0 has no eps"),
    (say("optimizer/param_groups/0/params", "all"), "group 0 has other parameters"),
    (say("optimizer/param_groups/0/params", [0] * 15), "group 0 has other parameters"),
    (say("optimizer/param_groups/1/lr", "fast"), "group 1: lr = 'fast', expected float"),
    (say("optimizer/param_groups/1/lr", True), "group 1: lr = 'True', expected float"),
    (say("optimizer/param_groups/1/lr", NAN), "group 1: lr = 'nan', expected float"),
    (say("optimizer/param_groups/1/lr", 10**400), "group 1: lr = '1000000.*', expected float"),
    (say("optimizer/param_groups/1/betas", 0.9), "group 1: betas = '0.9', expected tuple"),
    (say("optimizer/param_groups/1/betas", [0.9]), r"group 1: betas = '\[0.9\]', expected tuple"),
    (say("optimizer/param_groups/1/betas", [0.9, "b"]), "group 1: betas = 'b', expected float"),
    (say("optimizer/param_groups/1/fused", 1), "group 1: fused = '1', expected bool"),
    (say("iteration", -1), "header.iteration = -1: must be >= 0"),
    (say("iteration", "3"), "header.iteration = '3' is text, wanted an integer"),
    (say("iteration", 3.0), "header.iteration = 3.0 is a decimal, wanted an integer"),
    (say("iteration", [3]), "is a list, wanted an integer"),
    (say("format", "1"), "is text, wanted an integer"),
    (say("format", 0), "header.format = 0: must be >= 1"),
    (say("extra", []), "header.extra = .* is a list, wanted keys and values"),
]  # fmt: skip


@pytest.fixture(scope="module")
def good(made_once):
    """A checkpoint of `trained`, and its settings: not to be changed."""

    def make(folder):
        params = load_params(SMOKE, ["train.compile=false"])
        params["model"] |= {"vocab_size": 96, "context_length": 16}
        config = read_section(ModelConfig, params, "model")
        settings = config, read_section(TrainConfig, params, "train")
        save_checkpoint(*trained(*settings), 3, folder / "good.safetensors")
        return folder / "good.safetensors", settings

    return made_once("good", make)


@pytest.mark.parametrize(("change", "message"), IMPOSSIBLE, ids=[m for _, m in IMPOSSIBLE])
def test_an_impossible_checkpoint_is_refused_and_changes_nothing(good, tmp_path, change, message):
    path, settings = shutil.copy(good[0], tmp_path / "a.safetensors"), good[1]
    rewritten(path, change)
    verify(path)
    other = trained(*settings, steps=1, seed=5)
    before = copy.deepcopy([thing.state_dict() for thing in other])
    for source in (path, io.BytesIO(path.read_bytes()), as_folder(path)):
        with pytest.raises(InputError, match=message) as caught:
            load_checkpoint(source, *other)
        assert "\n" not in str(caught.value)
        assert_identical(before, [thing.state_dict() for thing in other], "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("optimizer.4.exp_avg"), "optimizer.4.exp_avg: missing"),
        (put("optimizer.4.step", lambda t: t - 9), "optimizer.4.step is negative"),
        (put("optimizer.4.exp_avg", lambda t: t[:1].clone()), "exp_avg is .*, expected"),
        (say("optimizer/param_groups/0/weight_decay", "much"), "weight_decay = 'much', expected"),
        (say("optimizer/values", {"4": {"t": "1"}}), "optimizer.4.t = '1', expected a number"),
        (say("optimizer/values", {"4": {"t": NAN}}), "optimizer.4.t = 'nan', expected a number"),
    ],
)
def test_an_impossible_state_of_torchs_optimizers_is_refused(model, tmp_path, change, message):
    optimizer = torch.optim.AdamW(model.parameters())
    cross_entropy(model(torch.ones(1, 4).long()), torch.ones(1, 4).long()).backward()
    optimizer.step()
    path = tmp_path / "a.safetensors"
    save_checkpoint(model, optimizer, 1, path)
    rewritten(path, change)
    with pytest.raises(InputError, match=message):
        load_checkpoint(path, model, optimizer)


def cut_in_two(folder):
    """The shard as two processes write it: each its half of the rows."""
    (whole,) = folder.glob("shard-*")
    tensors = {key: tensor for key, tensor in load_file(whole).items() if tensor.ndim}
    counters = {key: tensor for key, tensor in load_file(whole).items() if not tensor.ndim}
    whole.unlink()
    for rank in range(2):
        parts, offsets = {}, {}
        for key, tensor in tensors.items():
            half = -(-len(tensor) // 2)
            parts[key] = tensor[rank * half : (rank + 1) * half].clone()
            offsets[key] = {"saved_offsets": [rank * half] + [0] * (tensor.ndim - 1)}
        if rank == 0:
            parts |= counters
            offsets |= {key: {"saved_offsets": []} for key in counters}
        name = folder / f"shard-0000{rank + 1}-model-00001-of-00001.safetensors"
        save_file(parts, name, {"DCP_SHARDING_INFO": json.dumps(offsets)})


def shard_info(change):
    """Change what the second shard says of its place, or its tensors."""

    def do(folder):
        (file,) = folder.glob("shard-00002-*")
        with safe_open(file, framework="pt") as opened:
            info = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
        tensors = load_file(file)
        info = change(info, tensors) or info
        text = info if isinstance(info, str) else json.dumps(info)
        save_file(tensors, file, {"DCP_SHARDING_INFO": text})

    return do


def halves(key, change):
    def do(info, tensors):
        tensors[key] = change(tensors[key])

    return do


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: next(folder.glob("shard-00001-*")).unlink(), "damaged|missing|another"),
        (lambda folder: next(folder.glob("shard-00002-*")).unlink(), "another model"),
        (shard_info(halves(WEIGHT, lambda t: t[:1].clone())), "another model"),
        (shard_info(halves(WEIGHT, lambda t: t.int())), "model.lm_head.weight is of several types"),
        (shard_info(lambda info, tensors: "{"), "damaged shards"),
        (shard_info(lambda info, tensors: "[]"), "damaged shards"),
        (shard_info(lambda info, tensors: {WEIGHT: 3}), "damaged shards"),
        (shard_info(lambda info, tensors: info | {WEIGHT: {"saved_offsets": [0, 0]}}),
         "another model"),
        (shard_info(lambda info, tensors: info | {WEIGHT: {"saved_offsets": [-9, 0]}}),
         "another model|damaged"),
        (shard_info(lambda info, tensors: info | {WEIGHT: {"saved_offsets": "x"}}), "damaged sh"),
    ],
)  # fmt: skip
def test_an_impossible_folder_is_refused_and_changes_nothing(good, tmp_path, change, message):
    path, settings = shutil.copy(good[0], tmp_path / "a.safetensors"), good[1]
    folder = as_folder(path)
    cut_in_two(folder)
    other = trained(*settings, steps=1, seed=5)
    assert load_checkpoint(folder, *trained(*settings, steps=0)) == 3
    change(folder)
    before = copy.deepcopy([thing.state_dict() for thing in other])
    with pytest.raises(InputError, match=message) as caught:
        load_checkpoint(folder, *other)
    assert "\n" not in str(caught.value)
    assert_identical(before, [thing.state_dict() for thing in other], "")


def test_rows_that_no_shard_has_are_noticed(good, tmp_path):
    """The first half of a weight is gone; the second still says how many rows there are."""
    path, settings = shutil.copy(good[0], tmp_path / "a.safetensors"), good[1]
    folder = as_folder(path)
    cut_in_two(folder)
    (first,) = folder.glob("shard-00001-*")
    with safe_open(first, framework="pt") as opened:
        info = opened.metadata()
    tensors = load_file(first)
    del tensors[WEIGHT]
    save_file(tensors, first, info)
    with pytest.raises(InputError, match="lm_head.weight: 1536 of 3072 values are not finite"):
        load_checkpoint(folder, *trained(*settings, steps=0))


def test_what_is_wrong_with_an_optimizer_is_none_of_a_model_alone(
    model_config, train_config, tmp_path
):
    path = tmp_path / "a.safetensors"
    saved = trained(model_config, train_config)
    save_checkpoint(*saved, 3, path)
    rewritten(path, put(MOMENT, spoilt(NAN)))
    for source in (path, as_folder(path)):
        model = TransformerLM(model_config)
        assert load_checkpoint(source, model) == 3
        assert_identical(dict(saved[0].state_dict()), dict(model.state_dict()), "")


def test_a_mask_with_infinities_is_restored(tmp_path):
    """Of a model by others: a buffer, which no optimizer changes."""
    model = torch.nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((2, 2), -INF).triu(1))
    model.register_buffer("seen", torch.tensor(3))
    optimizer = torch.optim.AdamW(model.parameters())
    save_checkpoint(model, optimizer, 1, tmp_path / "a.safetensors")
    assert load_checkpoint(tmp_path / "a.safetensors", model, optimizer) == 1


def test_a_checkpoint_from_the_future_is_refused(model, train_config, tmp_path, monkeypatch):
    monkeypatch.setattr("lm.runs.checkpoint.FORMAT", 9)
    path = tmp_path / "a.safetensors"
    save_checkpoint(model, OPTIMIZERS["adamw"].make(model, train_config), 0, path)
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"newer version \(format 9, this one reads <= 1\)"):
        load_checkpoint(path, model)


def test_a_damaged_checkpoint_is_found(model, train_config, tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(model, OPTIMIZERS["adamw"].make(model, train_config), 0, path)
    commit(path)
    verify(path)
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    for damaged, message in ((bytes(flipped), "content differs"), (data[:-9], "its manifest says")):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=message):
            verify(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(InputError, match=r"no manifest a.json beside it"):
        verify(path)
    path.write_bytes(data.replace(b"iteration", b"jteration"))
    with pytest.raises(InputError, match="damaged header: no iteration"):
        load_checkpoint(path, model)


def test_a_failed_save_leaves_the_previous_checkpoint(model, train_config, tmp_path):
    """A file-size limit stands in for a full disk; the write fails half way."""
    path = tmp_path / "a.safetensors"
    optimizer = OPTIMIZERS["adamw"].make(model, train_config)
    save_checkpoint(model, optimizer, 1, path)
    commit(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(
            EnvironmentFault, match="a.safetensors: File too large .*needs 0.*intact"
        ):
            save_checkpoint(model, optimizer, 2, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    verify(path)
    assert load_checkpoint(path, model, optimizer) == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_a_model_folder_holds_all_that_using_it_needs(model_config, model, tmp_path):
    save_model(model, byte_tokenizer(), tmp_path)
    with pytest.raises(InputError, match="tokenizer has 256 tokens, the model 96"):
        load_model(tmp_path, torch.device("cpu"))
    model = TransformerLM(replace(model_config, vocab_size=256)).eval()
    save_model(model, byte_tokenizer(), tmp_path)
    loaded, tokenizer = load_model(tmp_path, torch.device("cpu"))
    ids = torch.tensor([tokenizer.encode("ab")])
    assert torch.equal(loaded(ids), model(ids))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["intra_document_masking"]  # a model from before there was the choice
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(load_model(tmp_path, torch.device("cpu"))[0](ids), model(ids))
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace("32", "64")
    )
    with pytest.raises(InputError, match="another model"):
        load_model(tmp_path, torch.device("cpu"))
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"config.json: no such file"):
        load_model(tmp_path, torch.device("cpu"))
