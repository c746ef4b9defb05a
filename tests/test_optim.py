"""Optimizers against torch's own and against the papers' formulas in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lm.model.transformer import TransformerLM
from lm.train.optim import OPTIMIZERS, AdamW, Muon, gradient_clipping, parameter_groups

SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def quadratic_run(optimizer_class, steps, **settings):
    """Parameters after following a noisy quadratic's gradients."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(7, 5, generator=generator), torch.randn(9, generator=generator)]
    for p in parameters:
        p.requires_grad_()
    optimizer = optimizer_class(parameters, **settings)
    for _ in range(steps):
        for p in parameters:
            p.grad = p.detach() + torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_equals_torch_adamw_over_1000_steps(fused):
    ours = quadratic_run(AdamW, 1000, fused=fused, **SETTINGS)
    theirs = quadratic_run(torch.optim.AdamW, 1000, foreach=False, fused=False, **SETTINGS)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_adamw_follows_the_paper_in_float64():
    gradients = np.random.default_rng(0).normal(size=(300, 6))
    start = np.linspace(-1, 1, 6)
    theta, m, v = start.copy(), np.zeros(6), np.zeros(6)
    for t, g in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        theta = theta - 3e-3 * 0.1 * theta
        theta = theta - 3e-3 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
    p = torch.tensor(start, requires_grad=True)
    optimizer = AdamW([p], **SETTINGS)
    for g in gradients:
        p.grad = torch.tensor(g)
        optimizer.step()
    np.testing.assert_allclose(p.detach().numpy(), theta, rtol=1e-9)


def test_adamw_leaves_parameters_without_gradient_alone():
    with_gradient, without = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    with_gradient.grad = torch.ones(3)
    AdamW([with_gradient, without], lr=0.1).step()
    assert (with_gradient < 1).all()
    assert (without == 1).all()


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1.0}])
def test_adamw_refuses_settings_out_of_range(bad):
    with pytest.raises(ValueError, match="out of range"):
        AdamW([torch.ones(1, requires_grad=True)], **bad)


def test_muon_equals_torch_muon():
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 8), (8, 16), (8, 16), (12, 12)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours = [p.clone().requires_grad_() for p in start]
    theirs = [p.clone().requires_grad_() for p in start]
    settings = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    muon, reference = Muon([{"params": ours, **settings}]), torch.optim.Muon(theirs, **settings)
    for _ in range(20):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        muon.step()
        reference.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        moved = (b - before).norm().item()
        assert (a - b).norm().item() < 0.02 * moved  # Newton-Schulz runs in bfloat16


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_norms_do_not_decay_and_embeddings_only_on_request(model_config, train_config, name):
    for decay_embeddings in (False, True):
        model = TransformerLM(replace(model_config, qk_norm=True))
        config = replace(train_config, optimizer=name, decay_embeddings=decay_embeddings)
        optimizer = OPTIMIZERS[name].make(model, config)
        decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        assert len(decays) == len(list(model.parameters()))
        for parameter_name, p in model.named_parameters():
            decayed = p.ndim == 2
            if parameter_name == "token_embeddings.weight":
                decayed = decay_embeddings
            assert (decays[id(p)] > 0) == decayed, parameter_name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_registry_says_what_each_choice_keeps(model_config, train_config, name):
    model, kind = TransformerLM(model_config), OPTIMIZERS[name]
    optimizer = kind.make(model, replace(train_config, optimizer=name))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for parameter_name, p in model.named_parameters():
        in_a_block = p.ndim == 2 and "layers" in parameter_name
        numbers = sum(t.numel() for entry, t in optimizer.state[p].items() if entry != "step")
        expected = kind.matrix_numbers if in_a_block else kind.other_numbers
        assert numbers == expected * p.numel(), parameter_name


def test_muon_takes_the_matrices_inside_the_blocks_alone(model_config):
    model = TransformerLM(model_config)
    matrices, *_ = parameter_groups(model, decay_embeddings=False)
    names = {n for n, p in model.named_parameters() if any(p is m for m in matrices)}
    assert names == {n for n, p in model.named_parameters() if "layers" in n and p.ndim == 2}


@pytest.mark.parametrize("where", ["layers.0.attn", ""])
def test_a_parameter_of_no_known_kind_is_an_error(model_config, where):
    model = TransformerLM(model_config)
    shape = (3, 8, 8) if where else (8, 8)  # a stack of matrices; a matrix outside of the blocks
    model.get_submodule(where).extra = torch.nn.Parameter(torch.zeros(shape))
    with pytest.raises(AssertionError, match="extra .* of no known kind"):
        parameter_groups(model, decay_embeddings=False)


def test_clipping_scales_the_joint_norm_and_skips_missing_gradients():
    a, b, c = (torch.zeros(n, requires_grad=True) for n in (2, 1, 4))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    norm = gradient_clipping([a, b, c], max_l2_norm=2.0)
    assert norm.item() == pytest.approx(5.0)
    expected = 2.0 / (5.0 + 1e-6)
    torch.testing.assert_close(a.grad, torch.tensor([3.0 * expected, 0.0]))
    torch.testing.assert_close(b.grad, torch.tensor([4.0 * expected]))
    assert c.grad is None
    gradient_clipping([a, b], max_l2_norm=100.0)
    assert a.grad[0].item() == pytest.approx(3.0 * expected)  # below the limit: untouched
