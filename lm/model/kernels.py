"""Compute the model's formulas in less memory or less time.

Three functions work differently when torch compiles them, so that the model need not:

    project                one product of all weights where compiled
    project_heads          queries, keys and values by one product where compiled
    attention              torch's kernels; compiled on a CPU, formulas in blocks of queries

Four functions compute their own gradients:

    rms_norm               keeps its input and one number a row
    causal_attention       keeps one number a row instead of the weights
    swiglu                 keeps its inputs instead of intermediate results
    linear_cross_entropy   computes its gradients with the loss instead of keeping logits

Letters in shapes as in transformer.py, and N = B T rows. The tests hold the plain formulas.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ATTENTION_BLOCK, MAX_ATTENTION_BLOCKS = 128, 4  # fewest queries in a block; most blocks
LOGITS_AT_ONCE, MAX_LOGITS_CHUNKS = 1 << 24, 8  # beyond 8 chunks training holds more
CROSS_ENTROPY_CHUNK = 1 << 26  # logits turned into float32 at once: 256 MiB
# the rows of the head are padded to a multiple: else tensor cores are much slower
HEAD_ALIGNMENT = {"cuda": 64}
Angles = tuple[Float[Tensor, "T half"], Float[Tensor, "T half"]]  # cosines and sines, (T, D / 2)
Mask = Bool[Tensor, "B 1 T T"]  # true where a query sees a key


def project(x: Float[Tensor, "*batch C"], weights: Sequence[Tensor]) -> list[Tensor]:
    """Return x @ weight.T for each weight.

    When compiled it is one product: copying the weights side by side is then part of a cast.
    """
    if len(weights) == 1 or not torch.compiler.is_compiling():
        return [F.linear(x, weight) for weight in weights]
    return list(F.linear(x, torch.cat(list(weights))).split([len(w) for w in weights], dim=-1))


def project_heads(
    x: Float[Tensor, "B T C"],
    weights: Sequence[Tensor],
    head_dim: int,
    norms: Sequence[Float[Tensor, " D"]] | None,
    eps: float,
    angles: Angles | None,
) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B G T D"], Float[Tensor, "B G T D"]]:
    """Return queries, keys and values: products with the three weights, split into heads.

    Queries and keys are normalized by the weights `norms` and rotated by `angles`. When compiled,
    each head has its even features before the odd ones: halves compile to faster code, and q . k
    does not depend on the order.
    """
    halves = torch.compiler.is_compiling() and angles is not None

    def ordered(weight: Tensor) -> Tensor:
        return evens_first(weight, head_dim) if halves else weight

    q, k, v = (
        product.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # (B, heads, T, D)
        for product in project(x, [ordered(weights[0]), ordered(weights[1]), weights[2]])
    )
    if norms is not None:
        q, k = (rms_norm(t, ordered(weight), eps) for t, weight in zip((q, k), norms, strict=True))
    if angles is not None:
        q, k = (rotate(t, *angles, halves) for t in (q, k))
    return q, k, v


def evens_first(weight: Float[Tensor, "E *C"], head_dim: int) -> Float[Tensor, "E *C"]:
    """Return the rows reordered: in each head the even ones before the odd ones."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def rotate(
    x: Float[Tensor, "B H T D"],
    cos: Float[Tensor, "T half"],
    sin: Float[Tensor, "T half"],
    halves: bool = False,
) -> Float[Tensor, "B H T D"]:
    """Rotate each pair of features (2i, 2i + 1) of each position by its angles (RoFormer, eq. 15).

    With `halves` a pair is (i, i + D / 2) instead: see `evens_first`.
    """
    cos, sin = cos[:, None], sin[:, None]  # (T, 1, D / 2)
    x = x.transpose(1, 2)  # (B, T, H, D), as it lies in memory
    even, odd = x.chunk(2, dim=-1) if halves else (x[..., 0::2], x[..., 1::2])
    rotated = even * cos - odd * sin, even * sin + odd * cos
    both = torch.cat(rotated, dim=-1) if halves else torch.stack(rotated, dim=-1).flatten(-2)
    return both.to(x.dtype).transpose(1, 2)


def document_mask(documents: Int[Tensor, "B T"]) -> Mask:
    """Return the mask that lets a query see the keys of its own document up to its own position.

    CUDA needs it, too. torch's varlen_attn has the number of documents in its shapes, which a graph
    cannot know. flex_attention has no dropout, and on a CPU no backward pass to test it by.
    """
    return (documents[:, :, None] == documents[:, None, :]).tril()[:, None]


def attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T D"],
    mask: Mask | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B H T D"]:
    """Return softmax(q k^T / sqrt(D)) v over the keys that `mask` shows; None: causal.

    Where there are fewer heads of keys and values, neighbouring heads of queries share them. On
    CUDA torch takes the first of these kernels that can compute it, each with a deterministic
    backward pass (`make_deterministic` excludes cuDNN's, which has none):

        FlashAttention      bfloat16 or float16 without a mask
        memory-efficient    float32, or with a mask, which it reads as (B, 1, T, T) numbers
        plain formulas      the rest: a GPU too old for both, heads of odd sizes
    """
    groups = q.shape[1] // k.shape[1]
    # FlashAttention alone can share heads: the second kernel cannot before torch 2.15
    # (pytorch/pytorch#191085), and the formulas would hold all T x T weights instead
    share = q.is_cuda and q.dtype == torch.bfloat16 and mask is None
    if groups > 1 and not share:
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))  # (B, H, T, D)
    if torch.compiler.is_compiling() and q.device.type == "cpu" and not dropout:
        return causal_attention(q, k, v, mask)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,
        dropout_p=dropout,
        enable_gqa=share and groups > 1,
    )


def rms_norm(
    x: Float[Tensor, "*batch C"], weight: Float[Tensor, " C"], eps: float
) -> Float[Tensor, "*batch C"]:
    """Return x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, eq. 4).

    Compute it in float32, whatever the dtype of x; the result has that dtype again.
    """
    normed: Tensor = _RMSNorm.apply(x, weight, eps)
    return normed


class _RMSNorm(torch.autograd.Function):
    """With n = x / rms(x): dx = (dy weight - n mean(dy weight n)) / rms(x), dweight = sum(dy n)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        by_rms = torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, by_rms)
        normed = x.float() * by_rms * weight.float()
        # under its compiler torch 2.11 loses all gradients if this ends in a `to` that does nothing
        return normed if normed.dtype == x.dtype else normed.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, by_rms = ctx.saved_tensors
        gradient, normed = gradients[0].float(), x.float() * by_rms
        by_weight = (gradient * normed).reshape(-1, len(weight)).sum(dim=0).to(weight.dtype)
        gradient = gradient * weight.float()
        along = (gradient * normed).mean(dim=-1, keepdim=True)
        by_x = gradient.sub_(normed.mul_(along)).mul_(by_rms)
        return by_x.to(x.dtype), by_weight, None


def causal_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T D"],
    mask: Mask | None = None,
) -> Float[Tensor, "B H T D"]:
    """Return softmax(q k^T / sqrt(D)) v, a block of queries at a time with the keys it may see.

    The backward pass computes the weights again (Dao et al. 2022, algorithm 4). Compiled on a CPU,
    these formulas are faster than torch's kernel (docs/LOG.md).
    """
    mixed: Tensor = _CausalAttention.apply(q, k, v, mask)
    return mixed


class _CausalAttention(torch.autograd.Function):
    """P = exp(S - log_sum), mixed = P v; dS = P * (dmixed v^T - rowsum(dmixed * mixed))."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        mixed, log_sums = [], []
        for start, end in attention_blocks(q.shape[2]):
            scores = _scores(q, k, mask, start, end)
            largest = scores.amax(dim=3, keepdim=True)
            e = (scores - largest).exp()
            total = e.sum(dim=3, keepdim=True)  # (B, H, size, 1)
            mixed.append(((e.to(v.dtype) @ v[:, :, :end]).float() / total).to(v.dtype))
            log_sums.append(largest + total.log())
        whole = torch.cat(mixed, dim=2)
        ctx.save_for_backward(q, k, v, mask, whole, torch.cat(log_sums, dim=2))
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, mask, mixed, log_sum = ctx.saved_tensors
        gradient = gradients[0]
        along = (gradient.float() * mixed.float()).sum(dim=3, keepdim=True)  # (B, H, T, 1)
        blocks, by_q, by_k, by_v = attention_blocks(q.shape[2]), [], [], []
        for start, end in blocks:
            weights = (_scores(q, k, mask, start, end) - log_sum[:, :, start:end]).exp()
            by_weights = (gradient[:, :, start:end] @ v[:, :, :end].mT).float()
            by_scores = weights * (by_weights - along[:, :, start:end]) / q.shape[3] ** 0.5
            by_scores = by_scores.to(q.dtype)  # (B, H, size, end)
            by_q.append(by_scores @ k[:, :, :end])
            by_k.append(by_scores.mT @ q[:, :, start:end])
            by_v.append(weights.to(v.dtype).mT @ gradient[:, :, start:end])

        def summed(parts: list[Tensor]) -> Tensor:
            """Sum over the blocks of queries that see a key; the first sees the fewest keys."""
            segments = [
                torch.stack([part[:, :, start:end].float() for part in parts[i:]]).sum(dim=0)
                for i, (start, end) in enumerate(blocks)
            ]
            return torch.cat(segments, dim=2).to(q.dtype)

        return torch.cat(by_q, dim=2), summed(by_k), summed(by_v), None


def attention_blocks(length: int) -> list[tuple[int, int]]:
    """Return (first, last + 1) of each block of queries in causal_attention."""
    size = max(ATTENTION_BLOCK, -(-length // MAX_ATTENTION_BLOCKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, start: int, end: int) -> Tensor:
    """Return float32 scores of queries start to end and the keys before end; -inf if hidden."""
    if mask is None:
        seen = torch.ones(end - start, end, dtype=torch.bool, device=q.device).tril(start)
    else:
        seen = mask[:, :, start:end, :end]
    scores = (q[:, :, start:end] @ k[:, :, :end].mT).float() / q.shape[3] ** 0.5
    return scores.masked_fill(~seen, -math.inf)


def swiglu(
    gate: Float[Tensor, "*batch F"], up: Float[Tensor, "*batch F"]
) -> Float[Tensor, "*batch F"]:
    """Return silu(gate) * up (Shazeer 2020)."""
    if not torch.is_grad_enabled():  # an autograd.Function would slow down decoding
        return _gated_silu(gate, up)
    product: Tensor = _SwiGLU.apply(gate, up)
    return product


def _gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated_silu(gate, up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        by_gate = torch.ops.aten.silu_backward(gradients[0] * up, gate)
        return by_gate, F.silu(gate).mul_(gradients[0])  # in place: no third tensor of this size


def cross_entropy(
    logits: Float[Tensor, "*batch V"], targets: Int[Tensor, "*batch"]
) -> Float[Tensor, ""]:
    """Return the mean negative log-likelihood of the targets, in nats, computed in float32.

    If a float32 copy of all logits would take much memory, convert chunks of rows one at a time,
    in the forward pass and again in the backward pass.
    """
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)  # (N, V), (N,)
    rows = max(1, CROSS_ENTROPY_CHUNK // logits.shape[1])
    if len(targets) <= rows:
        return _summed_cross_entropy(logits, targets) / len(targets)
    parts = [
        checkpoint(_summed_cross_entropy, chunk, target, use_reentrant=False)
        for chunk, target in zip(logits.split(rows), targets.split(rows), strict=True)
    ]
    return torch.stack(parts).sum() / len(targets)


def _summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def linear_cross_entropy(
    features: Float[Tensor, "N C"], weight: Float[Tensor, "V C"], targets: Int[Tensor, " N"]
) -> Float[Tensor, ""]:
    """Return cross_entropy(features @ weight.T, targets) in a fraction of the memory and time.

    Compute the gradients together with the loss, some rows at a time, and hold the logits of these
    rows only (Wijmans et al. 2024, "Cut your losses", at the level of tensors). The copy of
    `weight` that the products read is padded with rows of zeros to HEAD_ALIGNMENT.
    """
    loss: Tensor = _LinearCrossEntropy.apply(features, weight, targets)
    return loss


def guesses(
    features: Float[Tensor, "N C"], weight: Float[Tensor, "V C"], targets: Int[Tensor, " N"]
) -> list[Num[Tensor, " N"]]:
    """Return each row's loss in nats, its most probable token and the probability of that token.

    Hold at most LOGITS_AT_ONCE logits. If all fit, compute them by one product, as a plain forward
    pass does: for fewer rows a library may choose another kernel, whose last bits differ.
    """
    rows = max(1, LOGITS_AT_ONCE // len(weight))
    chunks = zip(features.split(rows), targets.split(rows), strict=True)
    return [torch.cat(t) for t in zip(*(_guesses(x, weight, y) for x, y in chunks), strict=True)]


def _guesses(features: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = F.linear(features, weight).float()
    losses = F.cross_entropy(logits, targets, reduction="none")
    top, ids = logits.max(dim=1)
    # p = e^(top - logsumexp), and the loss is logsumexp - the target's logit
    return losses, ids, (top - logits.gather(1, targets[:, None]).squeeze(1) - losses).exp()


def rows_at_once(count: int, vocab_size: int) -> int:
    """Return how many of `count` rows of logits linear_cross_entropy holds at once."""
    n_chunks = min(MAX_LOGITS_CHUNKS, -(-count * vocab_size // LOGITS_AT_ONCE))
    return -(-count // n_chunks)


class _LinearCrossEntropy(torch.autograd.Function):
    """With e = exp(logits - max) and s = sum(e): loss = log(s) + max - logits[target].

    The gradient with respect to the logits is e / s - onehot(target). To avoid a second pass over
    e, the narrow side of each product is divided by s; a gather and an index_add are the one-hot.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        device = features.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else features.dtype
        narrow, count, vocab_size = weight.to(dtype), len(targets), len(weight)
        if padding := -vocab_size % HEAD_ALIGNMENT.get(device, 1):
            narrow = F.pad(narrow, (0, 0, 0, padding))
        rows = rows_at_once(count, vocab_size)
        nats, by_features, by_weight = [], [], []
        for x, y in zip(features.split(rows), targets.split(rows), strict=True):
            logits = x.to(dtype) @ narrow.t()  # (rows, V + padding)
            if padding:
                logits[:, vocab_size:] = -math.inf  # no probability, and no gradient
            largest = logits.amax(dim=1, keepdim=True).float()  # (rows, 1)
            at_target = logits.gather(1, y[:, None]).float()  # (rows, 1)
            e = (logits.float() - largest).exp().to(dtype)
            s = e.float().sum(dim=1, keepdim=True)  # (rows, 1)
            nats.append((s.log() + largest - at_target).sum())
            by_features.append((e @ narrow).float() / s - narrow[y])
            by_weight.append(e.t() @ (x.float() / s).to(dtype))
        total = by_weight[0].float()
        for part in by_weight[1:]:
            total = total + part
        total = total.index_add(0, targets, features.float(), alpha=-1)
        if padding:
            total = total[:vocab_size]
        ctx.save_for_backward(torch.cat(by_features) / count, total / count)
        return torch.stack(nats).sum() / count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        by_features, by_weight = ctx.saved_tensors
        return gradients[0] * by_features, gradients[0] * by_weight, None
