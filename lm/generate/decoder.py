"""A TransformerLM that reads on: it keeps what it has seen, so that a token costs one step.

    read(rows, prompts)   these rows begin anew, each with ids of its own
    step(ids)             one more token for every row

The same function as the model's, for inference alone. A step of a small model is a question of how
many operations there are, not of how large they are. So weights that multiply the same stand side
by side, in a copy; all else is made once, keys and values too (KV cache).

Letters in shapes as in lm.model.transformer, and N = B T rows of x, S = context_length places to
remember.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lm.model.transformer import RMSNorm, TransformerLM, document_mask

SPAN = 16  # places are looked through in multiples of this: not all of S, in few shapes

# layer and its heads of q, k and v for each row of x -> what the values mix to
Attend = Callable[[int, Float[Tensor, "N heads D"]], Float[Tensor, "N E"]]


class _Layer(NamedTuple):
    """The weights of a block, transposed."""

    qkv: Float[Tensor, "C E"]
    qk_norm: Float[Tensor, "heads D"] | None
    output: Float[Tensor, "E C"]
    up: Float[Tensor, "C F"]  # with a gate: its weights before the others
    down: Float[Tensor, "F C"]
    norms: tuple[Tensor | None, Tensor | None]


def _layer(block: Any, dtype: torch.dtype) -> _Layer:
    """Of a Block."""
    attn, ffn = block.attn, block.ffn
    by_head = None
    if attn.q_norm and attn.k_norm:
        heads = zip((attn.q_norm, attn.k_norm), (attn.q_proj, attn.k_proj), strict=True)
        weights = [n.weight.expand(p.out_features // attn.head_dim, -1) for n, p in heads]
        by_head = torch.cat(weights).detach().to(dtype)
    return _Layer(
        _transposed(dtype, attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight),
        by_head,
        _transposed(dtype, attn.output_proj.weight),
        _transposed(dtype, ffn.w1.weight, *([ffn.w3.weight] if ffn.w3 else [])),
        _transposed(dtype, ffn.w2.weight),
        (_norm_weight(block.ln1), _norm_weight(block.ln2)),
    )


def _transposed(dtype: torch.dtype, *weights: Tensor) -> Tensor:
    return torch.cat(weights).detach().to(dtype).t().contiguous()


def _norm_weight(norm: torch.nn.Module) -> Tensor | None:
    return norm.weight.detach() if isinstance(norm, RMSNorm) else None


def memory_bytes(model: TransformerLM, n_rows: int, longest: int, dtype: torch.dtype) -> int:
    """Bytes that a Decoder of these rows takes, and its `read` of prompts of up to `longest` ids.

    The copied weights; keys and values of each layer, S places a row, and the mask over them; and
    of each id that is read the widest that is alive at once: x, its norm and both sides of the
    feed-forward layer. Of each row, at last, the logits and what sampling makes of them.
    """
    config, size = model.config, dtype.itemsize
    places = 2 * config.num_layers * config.kv_heads * config.head_dim + 1
    read = 4 * 3 * config.d_model + size * 2 * config.d_ff
    logits = config.vocab_size * (size + 3 * 8)
    a_row = config.context_length * places * size + longest * read + logits
    return model.num_parameters() * size + n_rows * a_row


class Decoder:
    """A model, its weights copied as `dtype`, and what it remembers of each of several rows."""

    def __init__(
        self,
        model: TransformerLM,
        n_rows: int,
        end_id: int | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        """`end_id` ends documents; a model with intra-document masking has to know it."""
        config = self.config = model.config
        self.model, self.end_id = model, end_id
        self.layers = [_layer(block, dtype) for block in model.layers]
        self.final_norm = _norm_weight(model.ln_final)
        self.embeddings = model.token_embeddings.weight.detach().to(dtype)
        self.averages = torch.full(
            (config.d_model, 1), 1 / config.d_model, device=self.embeddings.device
        )
        self.eps = torch.full((1, 1), config.norm_eps, device=self.embeddings.device)
        self.head = model.head.detach().to(dtype).t()  # (C, V); so wide, it is fast as it lies
        rope = model.rope
        self.turns = None if rope is None else torch.complex(rope.cos, rope.sin)  # (S, D / 2)
        length, like = config.context_length, self.embeddings
        shape = (config.num_layers, n_rows, 2, config.kv_heads, length, config.head_dim)
        self.memory = list(like.new_zeros(shape))  # of each layer: keys and values of each row
        self._slots = [layer.view(-1, config.head_dim) for layer in self.memory]
        self._keys = [layer[:, 0] for layer in self.memory]  # (B, G, S, D)
        self._values = [layer[:, 1] for layer in self.memory]
        self.mask = like.new_full((n_rows, length), -torch.inf)  # 0 where a row looks
        self.lengths = [0] * n_rows  # how many places are taken
        self.positions = torch.zeros(n_rows, dtype=torch.long, device=like.device)  # the same
        self._first_places = length * torch.arange(n_rows, device=like.device)  # in mask
        heads = length * torch.arange(n_rows * 2 * config.kv_heads, device=like.device)
        self._first_slots = heads.view(n_rows, -1)  # in a layer's memory

    @torch.inference_mode()
    def read(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> Float[Tensor, "R V"]:
        """Logits of what follows each prompt; each of `rows` forgets and remembers its own.

        Prompts have 1 to context_length ids. Shorter ones are padded on the right, where causality
        keeps the padding from mattering.
        """
        lengths = [len(prompt) for prompt in prompts]
        n, longest, config = len(prompts), max(lengths), self.config
        assert min(lengths) > 0
        assert longest <= config.context_length
        device = self.embeddings.device
        ids = torch.zeros(n, longest, dtype=torch.long)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        ids = ids.to(device)
        where, ends = torch.tensor(rows, device=device), torch.tensor(lengths, device=device)
        documents = self.model.documents(ids, self.end_id)
        mask = None if documents is None else document_mask(documents)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            qkv = qkv.unflatten(0, (n, longest)).transpose(1, 2)  # (R, heads, T, D)
            q, kv = qkv.split([config.num_heads, 2 * config.kv_heads], dim=1)
            self.memory[layer].flatten(1, 2)[where, :, :longest] = kv
            groups = config.num_heads // config.kv_heads
            k, v = kv.repeat_interleave(groups, dim=1).chunk(2, dim=1)
            mixed = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None
            )  # (R, H, T, D)
            return mixed.transpose(1, 2).reshape(n * longest, -1)

        turns = None if self.turns is None else self.turns[:longest].repeat(n, 1)
        x = self._features(ids.flatten(), turns, attend).unflatten(0, (n, longest))
        for row, length in zip(rows, lengths, strict=True):
            self.lengths[row] = length
        self.positions[where] = ends
        places = torch.arange(config.context_length, device=device)
        seen = places < ends[:, None]  # (R, S)
        if documents is not None:  # of them, the document to which the next token belongs
            last = torch.arange(n, device=device), ends - 1
            next_document = documents[last] + (ids[last] == self.end_id)
            seen[:, :longest] &= documents == next_document[:, None]
        self.mask[where] = torch.where(seen, 0.0, -torch.inf).to(self.mask.dtype)
        return x[torch.arange(n, device=device), ends - 1] @ self.head

    @torch.inference_mode()
    def step(self, ids: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        """Logits of what follows one more token of each row.

        A row that is full gives nothing of use, and has to be read anew.
        """
        config, n_rows = self.config, len(self.lengths)
        positions = self.positions.clamp(max=config.context_length - 1)
        self.mask.view(-1).index_fill_(0, self._first_places + positions, 0.0)
        slots = (self._first_slots + positions[:, None]).view(-1)
        self.lengths = [min(length + 1, config.context_length) for length in self.lengths]
        span = min(config.context_length, -(-max(self.lengths) // SPAN) * SPAN)
        mask = self.mask[:, None, None, :span]

        def attend(layer: int, qkv: Tensor) -> Tensor:
            new = qkv[:, config.num_heads :].reshape(-1, config.head_dim)
            self._slots[layer].index_copy_(0, slots, new)
            # heads that share keys are to attention what several queries of one head are
            shape = n_rows, config.kv_heads, -1, config.head_dim
            q = qkv[:, : config.num_heads].view(shape)
            k, v = self._keys[layer].narrow(2, 0, span), self._values[layer].narrow(2, 0, span)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(n_rows, -1)

        turns = None if self.turns is None else self.turns[positions]
        x = self._features(ids, turns, attend)
        if config.intra_document_masking:
            self.mask[ids == self.end_id] = -torch.inf
        self.positions = positions + 1
        return x @ self.head

    def _features(
        self, ids: Int[Tensor, " N"], turns: Tensor | None, attend: Attend
    ) -> Float[Tensor, "N C"]:
        """What the head turns into logits; `turns` (N, D / 2) are of each row's position."""
        config = self.config
        turned = config.num_heads + config.kv_heads  # q and k
        pre = config.norm_position == "pre"
        x = F.embedding(ids, self.embeddings)
        for i, layer in enumerate(self.layers):
            first, second = layer.norms
            h = self._norm(x, first) if pre else x
            qkv = (h @ layer.qkv).view(len(x), -1, config.head_dim)  # (N, heads, D)
            if layer.qk_norm is not None:
                normed = F.rms_norm(qkv[:, :turned], (config.head_dim,), eps=config.norm_eps)
                qkv[:, :turned] = normed * layer.qk_norm
            if turns is not None:
                _turn(qkv[:, :turned], turns)
            x = torch.addmm(x, attend(i, qkv), layer.output)
            if not pre:
                x = self._norm(x, first)
            h = (self._norm(x, second) if pre else x) @ layer.up
            if config.ffn == "swiglu":
                gate, up = h.chunk(2, dim=1)
                h = F.silu(gate).mul_(up)
            else:
                h = F.silu(h)
            x = torch.addmm(x, h, layer.down)
            if not pre:
                x = self._norm(x, second)
        return self._norm(x, self.final_norm)

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """As lm.model.kernels.rms_norm; a product takes the mean in half of the time."""
        if weight is None:
            return x
        exact = x.float()
        by_rms = torch.addmm(self.eps, exact.square(), self.averages).rsqrt_()
        return (exact * by_rms).mul_(weight).to(x.dtype)


def _turn(x: Float[Tensor, "N heads D"], turns: Tensor) -> None:
    """Rotary positions, in place: pairs (2i, 2i + 1) are complex numbers, a turn is a product."""
    exact = x.float()  # x itself if it is float32
    torch.view_as_complex(exact.view(*x.shape[:2], -1, 2)).mul_(turns[:, None])
    if exact is not x:
        x.copy_(exact)
