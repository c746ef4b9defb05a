"""A Transformer language model by the book: the papers' formulas, one by one.

Separate layers, an explicit mask and softmax, cross-entropy by logsumexp, AdamW and clipping as
loops over the parameters. The parameters have the names of lm.model.transformer, but no code is
shared: with the same weights in both, this one is an independent check.
"""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Linear(nn.Module):
    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        std = math.sqrt(2 / (d_in + d_out))
        weight = torch.empty(d_out, d_in)
        self.weight = nn.Parameter(nn.init.trunc_normal_(weight, 0, std, -3 * std, 3 * std))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Embedding(nn.Module):
    def __init__(self, vocab_size: int, d_model: int):
        super().__init__()
        weight = torch.empty(vocab_size, d_model)
        self.weight = nn.Parameter(nn.init.trunc_normal_(weight, 0, 1, -3, 3))

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids]


class RMSNorm(nn.Module):
    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps) * self.weight


class RoPE(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, context_length: int, theta: float):
        super().__init__()
        frequencies = theta ** (-torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.outer(torch.arange(context_length), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Float[Tensor, "B H T D"]) -> Float[Tensor, "B H T D"]:
        cos, sin = self.cos[: x.shape[2]], self.sin[: x.shape[2]]
        first, second = x[..., 0::2], x[..., 1::2]
        turned = torch.empty_like(x)
        turned[..., 0::2] = first * cos - second * sin
        turned[..., 1::2] = first * sin + second * cos
        return turned


class Attention(nn.Module):
    def __init__(self, d_model: int, num_heads: int, context_length: int, theta: float):
        super().__init__()
        self.num_heads = num_heads
        self.rope = RoPE(d_model // num_heads, context_length, theta)
        self.q_proj = Linear(d_model, d_model)
        self.k_proj = Linear(d_model, d_model)
        self.v_proj = Linear(d_model, d_model)
        self.output_proj = Linear(d_model, d_model)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        B, T, C = x.shape
        shape = B, T, self.num_heads, C // self.num_heads
        q = self.rope(self.q_proj(x).view(shape).transpose(1, 2))  # (B, H, T, D)
        k = self.rope(self.k_proj(x).view(shape).transpose(1, 2))
        v = self.v_proj(x).view(shape).transpose(1, 2)
        mask = torch.tril(torch.ones(T, T, dtype=torch.bool, device=x.device))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        mixed = softmax(scores.masked_fill(~mask, -math.inf)) @ v
        return self.output_proj(mixed.transpose(1, 2).reshape(B, T, C))


def softmax(x: Tensor) -> Tensor:
    e = torch.exp(x - x.amax(dim=-1, keepdim=True))
    return e / e.sum(dim=-1, keepdim=True)


class SwiGLU(nn.Module):
    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.w1 = Linear(d_model, d_ff)
        self.w2 = Linear(d_ff, d_model)
        self.w3 = Linear(d_model, d_ff)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.w1(x)
        return self.w2(gate * torch.sigmoid(gate) * self.w3(x))


class Block(nn.Module):
    def __init__(
        self, d_model: int, num_heads: int, d_ff: int, length: int, theta: float, eps: float
    ):
        super().__init__()
        self.ln1 = RMSNorm(d_model, eps)
        self.attn = Attention(d_model, num_heads, length, theta)
        self.ln2 = RMSNorm(d_model, eps)
        self.ffn = SwiGLU(d_model, d_ff)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.ffn(self.ln2(x))


class Transformer(nn.Module):
    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        num_layers: int,
        num_heads: int,
        d_ff: int,
        context_length: int,
        theta: float = 10000.0,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.token_embeddings = Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(
            Block(d_model, num_heads, d_ff, context_length, theta, eps) for _ in range(num_layers)
        )
        self.ln_final = RMSNorm(d_model, eps)
        self.lm_head = Linear(d_model, vocab_size)

    def forward(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        x = self.token_embeddings(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.ln_final(x))


def cross_entropy(logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"]) -> Tensor:
    at_target = logits.gather(-1, targets[..., None]).squeeze(-1)
    return (torch.logsumexp(logits, dim=-1) - at_target).mean()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.sqrt(sum((g.pow(2).sum() for g in gradients), torch.zeros(())))
    if norm > max_norm:
        for g in gradients:
            g.mul_(max_norm / (norm + 1e-6))


class AdamW(torch.optim.Optimizer):
    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float = 1e-8,
    ):
        settings = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps}
        super().__init__(parameters, settings)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                state = self.state[p]
                m, v = state.get("m", torch.zeros_like(p)), state.get("v", torch.zeros_like(p))
                t = state.get("t", 0) + 1
                m = beta1 * m + (1 - beta1) * p.grad
                v = beta2 * v + (1 - beta2) * p.grad**2
                corrected = math.sqrt(1 - beta2**t)
                rate = lr * corrected / (1 - beta1**t)
                p -= lr * group["weight_decay"] * p
                p -= rate * m / (torch.sqrt(v) + corrected * group["eps"])
                state["m"], state["v"], state["t"] = m, v, t
