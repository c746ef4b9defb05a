"""The Transformer language model.

    ids (B, T) -> token_embeddings -> num_layers x Block -> ln_final -> lm_head -> logits (B, T, V)
    Block:  x + attention(norm(x)),  then  x + feed_forward(norm(x))

Letters in shapes:
    B batch    T time     C d_model    V vocab_size    F d_ff
    H heads    G key/value heads       D head dimension (C / H)

The architecture is Llama's (Touvron et al. 2023): pre-norm with RMSNorm, rotary positions,
SwiGLU, no biases. Every deviation is one setting of ModelConfig.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lm.base.errors import InputError
from lm.base.settings import ModelConfig as ModelConfig
from lm.model.kernels import (
    attention,
    linear_cross_entropy,
    project,
    project_heads,
    rms_norm,
    swiglu,
)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        return rms_norm(x, self.weight, self.eps)


class RotaryEmbedding(nn.Module):
    """Angles position * theta^(-2i / D), by which pairs of features turn (RoFormer, eq. 15)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, context_length: int, theta: float):
        super().__init__()
        frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angles = torch.outer(torch.arange(context_length, dtype=torch.float64), frequencies)
        self.register_buffer("cos", angles.cos().float(), persistent=False)  # (T, D / 2)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, length: int) -> tuple[Float[Tensor, "T half"], Float[Tensor, "T half"]]:
        """Return the cosines and sines of the first positions."""
        return self.cos[:length], self.sin[:length]


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017), grouped (Ainslie et al. 2023)."""

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

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        rope: RotaryEmbedding | None,
        mask: Bool[Tensor, "B 1 T T"] | None = None,
    ) -> Float[Tensor, "B T C"]:
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = project_heads(
            x,
            [projection.weight for projection in projections],
            self.head_dim,
            norms=[self.q_norm.weight, self.k_norm.weight] if self.q_norm and self.k_norm else None,
            eps=self.norm_eps,
            angles=None if rope is None else rope(x.shape[1]),
        )  # (B, H, T, D), (B, G, T, D), (B, G, T, D)
        mixed = attention(q, k, v, mask, self.dropout if self.training else 0.0)  # (B, H, T, D)
        return self.output_proj(mixed.transpose(1, 2).flatten(2))


def document_mask(documents: Int[Tensor, "B T"]) -> Bool[Tensor, "B 1 T T"]:
    """True where queries may look: back, and in their own document."""
    return (documents[:, :, None] == documents[:, None, :]).tril()[:, None]


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x) (Shazeer 2020, eq. 6); "silu": w2(silu(w1 x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.w2 = nn.Linear(config.d_ff, config.d_model, bias=False)
        gated = config.ffn == "swiglu"
        self.w3 = nn.Linear(config.d_model, config.d_ff, bias=False) if gated else None

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        if self.w3 is None:
            return self.w2(F.silu(self.w1(x)))
        gate, up = project(x, [self.w1.weight, self.w3.weight])  # (B, T, F) each
        return self.w2(swiglu(gate, up))


class Block(nn.Module):
    """One layer: attention and feed-forward, each on a residual branch with its norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.pre_norm = config.norm_position == "pre"
        self.attn = Attention(config)
        self.ffn = FeedForward(config)
        self.ln1 = _norm(config)
        self.ln2 = _norm(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        rope: RotaryEmbedding | None,
        mask: Bool[Tensor, "B 1 T T"] | None = None,
    ) -> Float[Tensor, "B T C"]:
        if self.pre_norm:
            x = x + self.drop(self.attn(self.ln1(x), rope, mask))
            return x + self.drop(self.ffn(self.ln2(x)))
        x = self.ln1(x + self.drop(self.attn(x, rope, mask)))
        return self.ln2(x + self.drop(self.ffn(x)))


def _norm(config: ModelConfig) -> nn.Module:
    return RMSNorm(config.d_model, config.norm_eps) if config.norm == "rmsnorm" else nn.Identity()


class TransformerLM(nn.Module):
    """The language model: token ids to the logits of each next token."""

    def __init__(self, config: ModelConfig, gradient_checkpointing: bool = False):
        """Random weights from torch's global generator.

        `gradient_checkpointing` recomputes each block in the backward pass instead of keeping
        its activations (Chen et al. 2016).
        """
        super().__init__()
        self.config = config
        self.gradient_checkpointing = gradient_checkpointing
        self.token_embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.drop = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        # post-norm blocks end with a norm of their own
        self.ln_final = _norm(config) if config.norm_position == "pre" else nn.Identity()
        tied = config.tie_embeddings
        self.lm_head = None if tied else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.rope = (
            RotaryEmbedding(config.head_dim, config.context_length, config.rope_theta)
            if config.position_embedding == "rope"
            else None
        )
        self._initialise()

    def _initialise(self) -> None:
        """Normal cut at 3 std: linear layers std sqrt(2 / (d_in + d_out)), embeddings std 1.

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

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        documents: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits of the token after each position; see `features`."""
        return F.linear(self.features(ids, documents), self.head)

    def loss(
        self,
        ids: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"],
        documents: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, ""]:
        """cross_entropy(self(ids), targets), in nats, without holding all the logits at once."""
        features = self.features(ids, documents)
        return linear_cross_entropy(features.flatten(0, 1), self.head, targets.flatten())

    def features(
        self,
        ids: Int[Tensor, "B T"],
        documents: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T C"]:
        """What the head turns into the logits of the token after each position.

        A model with intra-document masking (Zhao et al. 2024) attends within a document alone; it,
        and no other, needs the `documents` of all positions. Raises ValueError if they are missing,
        or there are more positions than context_length.
        """
        if self.config.intra_document_masking != (documents is not None):
            raise ValueError("documents are for models with intra_document_masking, and for all")
        positions = ids.shape[1]
        if positions > self.config.context_length:
            raise ValueError(f"{positions} positions exceed {self.config.context_length=}")
        mask = None if documents is None else document_mask(documents)
        x = self.drop(self.token_embeddings(ids))  # (B, T, C)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, self.rope, mask, use_reentrant=False)
            else:
                x = layer(x, self.rope, mask)
        return self.ln_final(x)

    def documents(self, ids: Int[Tensor, "B T"], end_id: int | None) -> Int[Tensor, "B T"] | None:
        """What `forward` has to know of documents: for each position its own, counted from 0.

        An end token belongs to the document that it ends. None without intra-document masking.
        Raises InputError if there is masking, but no end token.
        """
        if not self.config.intra_document_masking:
            return None
        if end_id is None:
            raise InputError("model.intra_document_masking: no id is known to end a document")
        ends = (ids == end_id).long()
        return ends.cumsum(dim=1) - ends

    def num_parameters(self) -> int:
        """Trainable numbers, each counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> float:
        """Floating-point operations to train on one token, forward and backward.

        6 per weight that multiplies an activation and 12 L C T for attention over a full
        context (Chowdhery et al. 2022, appendix B; causality is not subtracted).
        """
        config = self.config
        looked_up = 0 if config.tie_embeddings else self.token_embeddings.weight.numel()
        attention = 12 * config.num_layers * config.d_model * config.context_length
        return 6.0 * (self.num_parameters() - looked_up) + attention
