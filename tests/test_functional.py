"""Functions with gradients of their own against the plain formulas, in float64 and by autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lm.machine.device import make_deterministic
from lm.model import kernels as functional
from lm.model.kernels import (
    attention,
    causal_attention,
    cross_entropy,
    document_mask,
    guesses,
    linear_cross_entropy,
    rms_norm,
    swiglu,
)


def assert_same(ours, plain, *inputs, rtol=1e-6):
    """Result and gradients of both, by inputs in float64 and a random gradient."""
    results, gradients = [], []
    for function in (ours, plain):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        results.append(function(*leaves))
        torch.manual_seed(0)
        incoming = torch.randn(results[-1].shape, dtype=results[-1].dtype)
        gradients.append(torch.autograd.grad(results[-1], leaves, incoming))
    torch.testing.assert_close(*results, atol=rtol, rtol=rtol)
    for got, wanted in zip(*gradients, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, atol=rtol, rtol=rtol)


def numbers(*shape):
    return torch.randn(shape, dtype=torch.float64)


def test_rms_norm_equals_torch():
    """Its arithmetic is in float32."""
    assert_same(
        lambda x, weight: rms_norm(x, weight, 1e-3),
        lambda x, weight: F.rms_norm(x, (10,), weight, 1e-3),
        numbers(3, 4, 10),
        1 + numbers(10),
        rtol=1e-5,
    )


def test_swiglu_equals_the_formula():
    assert_same(swiglu, lambda gate, up: F.silu(gate) * up, numbers(3, 4, 10), numbers(3, 4, 10))


@pytest.mark.parametrize("function", [lambda x, y: swiglu(x, y), lambda x, y: rms_norm(x, y, 0.0)])
def test_gradients_are_right_in_bfloat16_too(function):
    x, y = torch.randn(50), torch.randn(50)
    leaves = [t.bfloat16().requires_grad_() for t in (x, y)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    torch.autograd.grad(function(*leaves).sum(), leaves)
    for got, wanted in zip(
        torch.autograd.grad(function(*leaves).sum(), leaves),
        torch.autograd.grad(function(*exact).sum(), exact),
        strict=True,
    ):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), wanted, atol=0.02, rtol=0.03)


@pytest.mark.parametrize("length", [1, 7, 128, 200, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_blocks_equals_the_plain_kernel(monkeypatch, length, masked):
    monkeypatch.setattr(functional, "MAX_ATTENTION_BLOCKS", 2)
    mask = torch.rand(2, 1, length, length) < 0.5
    mask = (mask | torch.eye(length, dtype=torch.bool)).tril()
    how = {"attn_mask": mask} if masked else {"is_causal": True}
    assert_same(
        lambda q, k, v: causal_attention(q, k, v, mask if masked else None),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **how),
        *(numbers(2, 3, length, 8) for _ in range(3)),
        rtol=1e-5,
    )


def test_attention_is_finite_for_huge_scores():
    q = torch.full((1, 1, 3, 4), 1e4, requires_grad=True)
    mixed = causal_attention(q, q, q)
    assert mixed.isfinite().all()
    assert torch.autograd.grad(mixed.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        (lambda x: swiglu(x * 1, x * 2), 2),  # the product of both would be a third
        (lambda x: rms_norm(x * 1, torch.ones(64, requires_grad=True), 1e-5), 1.1),
        (lambda x: causal_attention(*(c * x.reshape(1, 8, 512, 64) for c in (1, 2, 3))), 4.1),
    ],
    ids=["swiglu", "rms_norm", "attention"],
)
def test_what_is_kept_for_the_backward_pass(function, kept):
    x, sizes = torch.randn(4096, 64, requires_grad=True), {}

    def keep(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function(x)
    assert sum(sizes.values()) <= kept * x.untyped_storage().nbytes()
    assert result.requires_grad


@pytest.mark.parametrize("logits_at_once", [1 << 24, 1000, 10])  # 19, 3 and 1 rows of 300
def test_guesses_are_those_of_all_logits_and_hold_those_of_some_rows(monkeypatch, logits_at_once):
    monkeypatch.setattr(functional, "LOGITS_AT_ONCE", logits_at_once)
    features, weight, targets = torch.randn(19, 16), torch.randn(300, 16), torch.randint(300, (19,))
    made = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made.extend(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    with Sizes():
        losses, ids, probabilities = guesses(features, weight, targets)
    logits = features.double() @ weight.double().T
    expected = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(ids, logits.argmax(dim=1))
    top = logits.softmax(dim=1).amax(dim=1)
    torch.testing.assert_close(probabilities.double(), top, atol=1e-5, rtol=1e-5)
    inputs = (weight.numel(), features.numel())  # views of them count as made
    assert max(size for size in made if size not in inputs) <= max(300, logits_at_once)


def test_cross_entropy_is_finite_for_huge_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([1, 2]))
    loss.backward()
    assert loss.item() == pytest.approx(1e4)
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (2, 3, 4)])
def test_cross_entropy_takes_any_batch_dimensions(shape):
    logits, targets = torch.randn(*shape, 11), torch.randint(11, shape)
    probabilities = torch.log_softmax(logits.double(), -1)
    expected = -probabilities.gather(-1, targets[..., None]).mean()
    assert cross_entropy(logits, targets).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_in_chunks_equals_the_whole_without_a_float32_copy(monkeypatch, dtype):
    monkeypatch.setattr(functional, "CROSS_ENTROPY_CHUNK", 1000)  # 3 rows of 300
    logits = torch.randn(64, 300).to(dtype)
    targets = torch.randint(300, (64,))
    whole = logits.clone().float().requires_grad_()
    F.cross_entropy(whole, targets).backward()
    chunked, kept = logits.clone().requires_grad_(), []

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() != chunked.untyped_storage().data_ptr():
            kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = cross_entropy(chunked, targets)
    assert sum(kept) < logits.numel()  # a float32 copy would be 4 bytes a logit
    loss.backward()
    assert loss.item() == pytest.approx(F.cross_entropy(whole, targets).item(), rel=1e-5)
    atol = 1e-7 if dtype == torch.float32 else 1e-4
    torch.testing.assert_close(chunked.grad.float(), whole.grad, atol=atol, rtol=1e-2)


@pytest.mark.parametrize("logits_at_once", [1 << 24, 2000, 300])  # 1, 3 and 8 chunks
@pytest.mark.parametrize("alignment", [1, 64])  # no rows of zeros, and 20
def test_linear_cross_entropy_has_the_loss_and_gradients_of_the_logits(
    monkeypatch, logits_at_once, alignment
):
    monkeypatch.setattr(functional, "LOGITS_AT_ONCE", logits_at_once)
    monkeypatch.setitem(functional.HEAD_ALIGNMENT, "cpu", alignment)
    features, weight = torch.randn(19, 16), torch.randn(300, 16)
    targets = torch.cat([torch.tensor([0, 299, 7, 7, 7]), torch.randint(300, (14,))])
    ours = [t.clone().requires_grad_() for t in (features, weight)]
    theirs = [t.double().requires_grad_() for t in (features, weight)]
    loss = linear_cross_entropy(*ours, targets)
    expected = F.cross_entropy(theirs[0] @ theirs[1].T, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (loss * 3).backward()
    (expected * 3).backward()
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.grad.double(), wanted.grad, atol=1e-6, rtol=1e-5)


def test_linear_cross_entropy_in_bfloat16_is_nearer_to_the_truth_than_the_plain_way():
    features, weight = torch.randn(200, 32), torch.randn(500, 32) / 4
    targets = torch.randint(500, (200,))

    def gradients(loss_of, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (features, weight)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            loss = loss_of(*leaves)
        return [g.double() for g in torch.autograd.grad(loss, leaves)]

    def plain(x, w):
        return F.cross_entropy(F.linear(x, w).to(x.dtype), targets)

    truth = gradients(plain, torch.float64)
    for got, other, true in zip(
        gradients(lambda x, w: linear_cross_entropy(x, w, targets), torch.float32),
        gradients(plain, torch.float32),
        truth,
        strict=True,
    ):
        assert (got - true).norm() < (other - true).norm() < 0.01 * true.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_fill_up_the_head_take_no_probability(monkeypatch, dtype):
    """Every logit is negative, so that a logit of 0 would take nearly all of it."""
    features, weight = torch.rand(19, 16).to(dtype), -torch.rand(300, 16).to(dtype)
    targets = torch.randint(300, (19,))

    def loss_and_gradients(x, w):
        loss = linear_cross_entropy(x, w, targets)
        return loss, *torch.autograd.grad(loss, (x, w))

    leaves = [t.requires_grad_() for t in (features, weight)]
    expected = loss_and_gradients(*leaves)
    monkeypatch.setitem(functional.HEAD_ALIGNMENT, "cpu", 64)
    for got, wanted in zip(loss_and_gradients(*leaves), expected, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted)


def test_linear_cross_entropy_is_finite_for_huge_logits():
    features, weight = torch.tensor([[1e4], [-1e4]]), torch.tensor([[1.0], [-1.0], [0.0]])
    loss = linear_cross_entropy(
        features.requires_grad_(), weight.requires_grad_(), torch.tensor([1, 1])
    )
    loss.backward()
    assert loss.item() == pytest.approx(1e4)
    assert features.grad.isfinite().all()
    assert weight.grad.isfinite().all()


@pytest.fixture
def deterministic(monkeypatch):
    """Torch as `make_deterministic` leaves it, and as it was afterwards."""
    mode, cudnn = torch.get_deterministic_debug_mode(), torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    make_deterministic(torch.device("cuda"), None)
    yield
    torch.set_deterministic_debug_mode(mode)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


def test_attention_never_takes_the_kernel_that_has_no_order(deterministic):
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [8, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_attention_on_cuda_equals_the_formula_and_repeats_its_bits(
    deterministic, dtype, masked, heads, dropout
):
    q, k, v = (torch.randn(4, n, 200, 64, device="cuda", dtype=dtype) for n in (8, heads, heads))
    leaves, incoming = [t.requires_grad_() for t in (q, k, v)], torch.randn_like(q)
    documents = torch.arange(200, device="cuda").div(70, rounding_mode="floor").expand(4, -1)
    mask = document_mask(documents) if masked else None

    def run():
        torch.manual_seed(0)
        mixed = attention(q, k, v, mask, dropout)
        return mixed, *torch.autograd.grad(mixed, leaves, incoming)

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    if not dropout:
        exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
        shared = (exact[0], *(t.repeat_interleave(8 // heads, dim=1) for t in exact[1:]))
        seen = (
            torch.ones(200, 200, dtype=torch.bool, device="cuda").tril() if mask is None else mask
        )
        scores = (shared[0] @ shared[1].mT / 8).masked_fill(~seen, float("-inf"))
        mixed = scores.softmax(dim=-1) @ shared[2]
        wanted = mixed, *torch.autograd.grad(mixed, exact, incoming.double())
        tolerance = 1e-4 if dtype == torch.float32 else 0.03
        for got, true in zip(first, wanted, strict=True):
            torch.testing.assert_close(got.double(), true, atol=tolerance, rtol=tolerance)


@pytest.mark.cuda
def test_the_head_on_cuda_is_filled_up_and_repeats_its_bits(deterministic):
    features, weight = torch.randn(190, 64, device="cuda"), torch.randn(5003, 64, device="cuda") / 8
    targets = torch.randint(5003, (190,), device="cuda")
    leaves = [t.requires_grad_() for t in (features, weight)]

    def run():
        with torch.autocast("cuda", torch.bfloat16):
            loss = linear_cross_entropy(*leaves, targets)
        return loss, *torch.autograd.grad(loss, leaves)

    first = run()
    assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    exact = [t.detach().double().requires_grad_() for t in leaves]
    loss = F.cross_entropy(exact[0] @ exact[1].T, targets)
    for got, true in zip(first, (loss, *torch.autograd.grad(loss, exact)), strict=True):
        assert (got - true).norm() < 0.01 * true.norm()
