"""Checkpoints: exact, safe to open, whole or absent, and one writer at a time."""

import io
import json
import os
import pickle
import resource
import signal
from dataclasses import replace

import pytest
import torch

from lm.checkpoint import (
    commit,
    load_checkpoint,
    load_model,
    read_extra,
    save_checkpoint,
    save_model,
    verify,
)
from lm.errors import EnvironmentFault, InputError
from lm.functional import cross_entropy
from lm.model import TransformerLM
from lm.optim import OPTIMIZERS
from lm.tokenizer import byte_tokenizer


def trained(model_config, train_config, steps=3, optimizer="adamw", seed=0):
    """A model and its optimizer after a few steps."""
    torch.manual_seed(seed)
    model = TransformerLM(model_config)
    optimizer = OPTIMIZERS[optimizer](model, replace(train_config, optimizer=optimizer))
    for _ in range(steps):
        ids = torch.randint(96, (2, 17))
        optimizer.zero_grad()
        cross_entropy(model(ids[:, :-1]), ids[:, 1:]).backward()
        optimizer.step()
    return model, optimizer


def assert_same(a, b):
    """Model and optimizer hold the same bits."""
    for key, tensor in a[0].state_dict().items():
        assert torch.equal(tensor, b[0].state_dict()[key]), key
    ours, theirs = a[1].state_dict(), b[1].state_dict()
    assert ours["state"].keys() == theirs["state"].keys()
    for index, entries in ours["state"].items():
        for key, value in entries.items():
            assert torch.equal(value, theirs["state"][index][key]), (index, key)
    as_lists = [json.dumps(state["param_groups"], sort_keys=True) for state in (ours, theirs)]
    assert as_lists[0] == as_lists[1]


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


@pytest.mark.parametrize("settings", [{"momentum": 0.9}, {}])
def test_optimizers_of_torch_are_restored_too(model_config, tmp_path, settings):
    def make(steps):
        torch.manual_seed(0)
        model = TransformerLM(model_config)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **settings)
        for _ in range(steps):
            cross_entropy(model(torch.ones(1, 4).long()), torch.ones(1, 4).long()).backward()
            optimizer.step()
        return model, optimizer

    saved, fresh = make(2), make(0)
    save_checkpoint(*saved, 2, tmp_path / "a.safetensors")
    load_checkpoint(tmp_path / "a.safetensors", *fresh)
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
    save_checkpoint(model, OPTIMIZERS["adamw"](model, train_config), 0, tmp_path / "a.safetensors")
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


def test_a_checkpoint_from_the_future_is_refused(model, train_config, tmp_path, monkeypatch):
    monkeypatch.setattr("lm.checkpoint.FORMAT", 9)
    path = tmp_path / "a.safetensors"
    save_checkpoint(model, OPTIMIZERS["adamw"](model, train_config), 0, path)
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"newer version \(format 9, this one reads <= 1\)"):
        load_checkpoint(path, model)


def test_a_damaged_checkpoint_is_found(model, train_config, tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(model, OPTIMIZERS["adamw"](model, train_config), 0, path)
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
    optimizer = OPTIMIZERS["adamw"](model, train_config)
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
