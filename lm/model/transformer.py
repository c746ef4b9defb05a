"""The Transformer language model.

    ids (B, T) -> token_embeddings -> num_layers x Block -> ln_final -> lm_head -> logits (B, T, V)
    Block:  x + attention(norm(x)),  then  x + feed_forward(norm(x))

Letters in shapes:
    B batch    T time     C d_model    V vocab_size    F d_ff
    H heads    G key/value heads       D head dimension (C / H)

The architecture is Llama's (Touvron et al. 2023): pre-norm with RMSNorm, rotary positions,
SwiGLU, no biases. Every deviation is one setting of ModelConfig. kernels.py computes the formulas.
"""

import math
from typing import assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lm.base.errors import InputError
from lm.base.settings import ModelConfig as ModelConfig
from lm.model.activations import ACTIVATIONS
from lm.model.kernels import (
    Angles,
    Mask,
    attention,
    document_mask,
    guesses,
    linear_cross_entropy,
    project,
    project_heads,
    rms_norm,
)

Ids = Int[Tensor, "B T"]
Features = Float[Tensor, "B T C"]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        return rms_norm(x, self.weight, self.eps)


class RotaryEmbedding(nn.Module):
    """Angles position * theta^(-2i / D) that rotate pairs (Su et al. 2021, RoFormer)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, context_length: int, theta: float):
        super().__init__()
        frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angles = torch.outer(torch.arange(context_length, dtype=torch.float64), frequencies)
        self.register_buffer("cos", angles.cos().float(), persistent=False)  # (T, D / 2)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, length: int) -> Angles:
        """Return the cosines and sines of the first positions."""
        return self.cos[:length], self.sin[:length]


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017), grouped (Ainslie et al. 2023).

    output_proj(softmax(q k^T / sqrt(D)) v), with q and k rotated by the angles of their positions.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, kv_width = config.d_model, config.kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.dropout, self.norm_eps = config.dropout, config.norm_eps
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.output_proj = nn.Linear(width, width, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Features, angles: Angles | None, mask: Mask | None) -> Features:
        weights = [self.q_proj.weight, self.k_proj.weight, self.v_proj.weight]
        norms = [self.q_norm.weight, self.k_norm.weight] if self.q_norm and self.k_norm else None
        # q (B, H, T, D), k and v (B, G, T, D)
        q, k, v = project_heads(x, weights, self.head_dim, norms, self.norm_eps, angles)
        mixed = attention(q, k, v, mask, self.dropout if self.training else 0.0)  # (B, H, T, D)
        return self.output_proj(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """w2(f(w1 x)), or with a gate w2(f(w1 x, w3 x)); activations.py holds the choices of f."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.ffn]
        self.w1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.w2 = nn.Linear(config.d_ff, config.d_model, bias=False)
        gated = self.activation.gated
        self.w3 = nn.Linear(config.d_model, config.d_ff, bias=False) if gated else None

    @property
    def inner(self) -> list[Tensor]:
        """The matrices before the activation, (F, C) each."""
        return [layer.weight for layer in (self.w1, self.w3) if layer is not None]

    def forward(self, x: Features) -> Features:
        return self.w2(self.activation.function(*project(x, self.inner)))


def make_norm(config: ModelConfig) -> nn.Module:
    """Return the norm of a residual branch; an ablation has none."""
    return {"rmsnorm": RMSNorm(config.d_model, config.norm_eps), "none": nn.Identity()}[config.norm]


class Block(nn.Module):
    """One layer: attention and feed-forward, each on a residual branch with its norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm_position = config.norm_position
        self.attn = Attention(config)
        self.ffn = FeedForward(config)
        self.ln1 = make_norm(config)
        self.ln2 = make_norm(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Features, angles: Angles | None, mask: Mask | None) -> Features:
        match self.norm_position:
            case "pre":
                x = x + self.drop(self.attn(self.ln1(x), angles, mask))
                return x + self.drop(self.ffn(self.ln2(x)))
            case "post":
                x = self.ln1(x + self.drop(self.attn(x, angles, mask)))
                return self.ln2(x + self.drop(self.ffn(x)))
            case _:
                assert_never(self.norm_position)


class TransformerLM(nn.Module):
    """The language model: token ids to the logits of each next token."""

    def __init__(self, config: ModelConfig, gradient_checkpointing: bool = False):
        """Draw random weights from torch's global generator.

        `gradient_checkpointing` recomputes each block in the backward pass instead of keeping
        its activations (Chen et al. 2016).
        """
        super().__init__()
        self.config = config
        self.gradient_checkpointing = gradient_checkpointing
        self.token_embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.drop = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        # after post-norm blocks, which end with a norm, there is none
        self.ln_final = {"pre": make_norm(config), "post": nn.Identity()}[config.norm_position]
        tied = config.tie_embeddings
        self.lm_head = None if tied else nn.Linear(config.d_model, config.vocab_size, bias=False)
        rotary = {"rope": True, "none": False}[config.position_embedding]
        angles = config.head_dim, config.context_length, config.rope_theta
        self.rope = RotaryEmbedding(*angles) if rotary else None
        self._initialise()

    def _initialise(self) -> None:
        """Draw normal weights cut at 3 std: embeddings std 1, others sqrt(2 / (d_in + d_out)).

        A tied embedding is the head as well and takes the head's std, or its logits would
        start with a std of sqrt(d_model).
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                std = math.sqrt(2 / sum(module.weight.shape))
                if isinstance(module, nn.Embedding) and not self.config.tie_embeddings:
                    std = 1.0
                nn.init.trunc_normal_(module.weight, 0.0, std, -3 * std, 3 * std)
                if self.config.zero_init and name.endswith(("output_proj", "w2")):
                    nn.init.zeros_(module.weight)

    @property
    def head(self) -> Tensor:
        """The matrix that turns features into logits, (V, C)."""
        return self.lm_head.weight if self.lm_head else self.token_embeddings.weight

    def forward(self, ids: Ids, documents: Ids | None = None) -> Float[Tensor, "B T V"]:
        """Return the logits of each next token; see `features`."""
        return F.linear(self.features(ids, documents), self.head)

    def loss(self, ids: Ids, targets: Ids, documents: Ids | None = None) -> Float[Tensor, ""]:
        """Return cross_entropy(self(ids), targets) in nats, without holding all the logits."""
        features = self.features(ids, documents)
        return linear_cross_entropy(features.flatten(0, 1), self.head, targets.flatten())

    def guesses(self, ids: Ids, targets: Ids, documents: Ids | None = None) -> list[Tensor]:
        """Return kernels.guesses of all positions, flat, without holding all the logits."""
        return guesses(self.features(ids, documents).flatten(0, 1), self.head, targets.flatten())

    def features(self, ids: Ids, documents: Ids | None = None) -> Features:
        """Return the features that the head turns into the logits of each next token.

        Pass the `documents` of all positions if and only if the model has intra-document masking
        (Zhao et al. 2024), which limits attention to a position's own document. Raises ValueError
        otherwise, and for more positions than context_length.
        """
        if self.config.intra_document_masking != (documents is not None):
            raise ValueError("pass documents if and only if model.intra_document_masking is true")
        positions = ids.shape[1]
        if positions > self.config.context_length:
            raise ValueError(f"{positions} positions exceed {self.config.context_length=}")
        angles = None if self.rope is None else self.rope(positions)
        mask = None if documents is None else document_mask(documents)
        x = self.drop(self.token_embeddings(ids))  # (B, T, C)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, angles, mask, use_reentrant=False)
            else:
                x = layer(x, angles, mask)
        return self.ln_final(x)

    def documents(self, ids: Ids, end_id: int | None) -> Ids | None:
        """Return the number of each position's document, from 0; None without masking.

        An end token belongs to the document that it ends. Raises InputError if the model has
        intra-document masking and `end_id` is None.
        """
        if not self.config.intra_document_masking:
            return None
        if end_id is None:
            raise InputError("model.intra_document_masking: no id is known to end a document")
        ends = (ids == end_id).long()
        return ends.cumsum(dim=1) - ends

    def num_parameters(self) -> int:
        """Return the number of trainable parameters, each counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> float:
        """Return the floating-point operations to train on one token, forward and backward.

        6 per weight that multiplies an activation and 12 L C T for attention over a full
        context (Chowdhery et al. 2022, appendix B; causality is not subtracted).
        """
        config = self.config
        looked_up = 0 if config.tie_embeddings else self.token_embeddings.weight.numel()
        attention = 12 * config.num_layers * config.d_model * config.context_length
        return 6.0 * (self.num_parameters() - looked_up) + attention
