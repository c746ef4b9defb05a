"""Decode with a KV cache: keep keys and values, so that a new token costs one step.

    read(rows, prompts)   forget these rows, and read a prompt into each
    step(ids)             append one token to every row

It computes the logits of TransformerLM, for inference only. The time of a small model's step
depends on the number of its operations, not on their size. So the decoder copies the weights, joins
those that multiply the same input, and ends a residual branch in one addmm. On a GPU it replays a
step as a CUDA graph. The activation and the attention over a prompt are the model's own. Norms,
rotary positions and the order of a block are repeated here: stage evaluate and lm.export call
`require_same_logits`, which compares both on real ids.

Letters in shapes as in lm.model.transformer; N = B T rows of x, S = context_length places to keep.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from lm.base.errors import InputError
from lm.model.activations import Activation
from lm.model.kernels import attention, document_mask
from lm.model.transformer import RMSNorm, TransformerLM

SPAN = 16  # a step attends to a multiple of it: fewer places than S, and few different shapes
GRAPH_SPAN = 256  # the same on a GPU, where each multiple needs a graph of its own
COMPARED, TOLERANCE = 32, 1e-3  # ids; how far logits may be off, as a share of the largest

# (number of a layer, its heads of q, k and v for each row of x) -> the mixed values
Attend = Callable[[int, Float[Tensor, "N heads D"]], Float[Tensor, "N E"]]


class _Layer:
    """Copies of a Block's weights, transposed; those that multiply the same input are joined."""

    def __init__(self, block: Any, dtype: torch.dtype):
        attn, ffn = block.attn, block.ffn

        def transposed(*weights: Tensor) -> Tensor:
            return torch.cat(weights).detach().to(dtype).t().contiguous()

        self.qkv = transposed(attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight)  # (C, E)
        self.output = transposed(attn.output_proj.weight)  # (E, C)
        self.up = transposed(*ffn.inner)  # (C, F); a gate's weights come first
        self.down = transposed(ffn.w2.weight)  # (F, C)
        self.activation: Activation = ffn.activation
        self.norms = _norm_weight(block.ln1), _norm_weight(block.ln2)
        self.qk_norm: Tensor | None = None
        if attn.q_norm and attn.k_norm:
            heads = (attn.q_norm, attn.q_proj), (attn.k_norm, attn.k_proj)
            weights = [n.weight.expand(p.out_features // attn.head_dim, -1) for n, p in heads]
            self.qk_norm = torch.cat(weights).detach().to(dtype)  # (heads, D)


def _norm_weight(norm: nn.Module) -> Tensor | None:
    match norm:
        case RMSNorm():
            return norm.weight.detach()
        case nn.Identity():
            return None
        case _:
            raise AssertionError(f"the decoder does not know {type(norm).__name__}")


def memory_bytes(
    model: TransformerLM, n_rows: int, longest: int, dtype: torch.dtype, on_gpu: bool
) -> int:
    """Return the bytes that generating `n_rows` takes at most, with prompts of `longest` ids.

    A Decoder holds copies of the weights and, for each row, S places: keys and values of each
    layer, and the mask. Each CUDA graph holds logits of its own; all share their other memory.
    `read` needs most in a feed-forward layer: x, its norm and both sides, for each id. Sampling
    needs most with top-p: logits, sorted logits, and six numbers of 8 bytes for each.
    """
    config, size = model.config, dtype.itemsize
    copied = sum(weight.numel() for weight in model.layers.parameters() if weight.dim() == 2)
    if dtype != model.head.dtype:
        copied += 2 * model.head.numel()  # the embedding and the head, tied or not
    places = 2 * config.num_layers * config.kv_heads * config.head_dim + 1
    read = 4 * 3 * config.d_model + size * 2 * config.d_ff
    n_graphs = -(-config.context_length // GRAPH_SPAN) if on_gpu else 0
    logits = config.vocab_size * ((n_graphs + 2) * size + 6 * 8)
    a_row = config.context_length * places * size + longest * read + logits
    return copied * size + n_rows * a_row


class Decoder:
    """A model's weights, copied as `dtype`, and the keys and values of several rows."""

    def __init__(
        self,
        model: TransformerLM,
        n_rows: int,
        end_id: int | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        """Copy the weights; a model with intra-document masking needs the `end_id` of documents."""
        config = self.config = model.config
        self.model, self.end_id = model, end_id
        self.layers = [_Layer(block, dtype) for block in model.layers]
        self.final_norm = _norm_weight(model.ln_final)
        like = self.embeddings = model.token_embeddings.weight.detach().to(dtype)
        width, device = config.d_model, like.device
        self.averages = torch.full((width, 1), 1 / width, device=device)
        self.eps = torch.full((1, 1), config.norm_eps, device=device)
        self.head = model.head.detach().to(dtype).t()  # (C, V); wide, so it is fast without a copy
        assert config.position_embedding in ("rope", "none"), config.position_embedding
        rope = model.rope  # as complex numbers, (S, D / 2)
        self.turns = None if rope is None else torch.complex(rope.cos, rope.sin)
        length = config.context_length
        shape = (config.num_layers, n_rows, 2, config.kv_heads, length, config.head_dim)
        self.memory = list(like.new_zeros(shape))  # of each layer: keys and values of each row
        self._slots = [layer.view(-1, config.head_dim) for layer in self.memory]
        self._keys = [layer[:, 0] for layer in self.memory]  # (B, G, S, D)
        self._values = [layer[:, 1] for layer in self.memory]
        self.mask = like.new_full((n_rows, length), -torch.inf)  # 0 where a row attends, else -inf
        self.lengths = [0] * n_rows  # how many places are taken
        self.positions = torch.zeros(n_rows, dtype=torch.long, device=device)  # may exceed S
        self.ids = torch.zeros_like(self.positions)  # the input of the graphs
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # by span
        self.warm: set[int] = set()  # spans in which a step has run
        self.capturing = True  # until a capture fails
        self._first_places = length * torch.arange(n_rows, device=device)  # in the flat mask
        heads = length * torch.arange(n_rows * 2 * config.kv_heads, device=device)
        self._first_slots = heads.view(n_rows, -1)  # in a layer's flat memory

    @torch.inference_mode()
    def read(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> Float[Tensor, "R V"]:
        """Read a prompt into each of `rows`; return the logits of the ids that follow.

        Prompts have 1 to context_length ids. Shorter ones are padded on the right: causality hides
        the padding from them.
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
            k, v = kv.chunk(2, dim=1)
            mixed = attention(q, k, v, mask)  # (R, H, T, D)
            return mixed.transpose(1, 2).reshape(n * longest, -1)

        turns = None if self.turns is None else self.turns[:longest].repeat(n, 1)
        x = self._features(ids.flatten(), turns, attend).unflatten(0, (n, longest))
        for row, length in zip(rows, lengths, strict=True):
            self.lengths[row] = length
        self.positions[where] = ends
        places = torch.arange(config.context_length, device=device)
        seen = places < ends[:, None]  # (R, S)
        if documents is not None:  # only the document to which the next token belongs
            last = torch.arange(n, device=device), ends - 1
            next_document = documents[last] + (ids[last] == self.end_id)
            seen[:, :longest] &= documents == next_document[:, None]
        self.mask[where] = torch.where(seen, 0.0, -torch.inf).to(self.mask.dtype)
        return x[torch.arange(n, device=device), ends - 1] @ self.head

    @torch.inference_mode()
    def step(self, ids: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        """Append a token to each row; return the logits of the ids that follow.

        The logits of a row that was full mean nothing: read it again.
        """
        length, on_gpu = self.config.context_length, self.ids.is_cuda
        self.lengths = [min(taken + 1, length) for taken in self.lengths]
        unit = GRAPH_SPAN if on_gpu else SPAN
        span = min(length, -(-max(self.lengths) // unit) * unit)
        return self._replay(ids, span) if on_gpu else self._step(ids, span)

    def _replay(self, ids: Int[Tensor, " B"], span: int) -> Float[Tensor, "B V"]:
        """Return `_step(ids, span)` by a CUDA graph: one launch instead of about 25 a layer.

        The first step of a span loads kernels and libraries, which a capture must not do. The
        second is captured. If that fails, all steps are plain calls.
        """
        self.ids.copy_(ids)
        if self.capturing and span in self.warm and span not in self.graphs:
            try:
                self.graphs[span] = self._capture(span)
            except RuntimeError as error:
                self.capturing = False
                warnings.warn(f"decoding without CUDA graphs: {error}", RuntimeWarning, 2)
        if span in self.graphs:
            graph, logits = self.graphs[span]
            graph.replay()
            return logits.clone()  # the next replay overwrites them
        self.warm.add(span)
        with _one_kernel_to_copy():
            return self._step(self.ids, span)

    def _capture(self, span: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Record a step without running it; return the graph and the logits that it will write."""
        graph, device = torch.cuda.CUDAGraph(), self.ids.device
        pool = next((kept.pool() for kept, _ in self.graphs.values()), None)
        with (
            torch.cuda.stream(torch.cuda.current_stream(device)),  # restored whatever happens
            torch.cuda.graph(graph, pool, _capture_stream(device), "thread_local"),
            _one_kernel_to_copy(),
        ):
            return graph, self._step(self.ids, span)

    def _step(self, ids: Int[Tensor, " B"], span: int) -> Float[Tensor, "B V"]:
        """Append a token to each row; attend to the first `span` places.

        A CUDA graph repeats this: tensors are changed in place, and the host reads no value.
        """
        config, n_rows = self.config, len(ids)
        positions = self.positions.clamp(max=config.context_length - 1)
        self.mask.view(-1).index_fill_(0, self._first_places + positions, 0.0)
        slots = (self._first_slots + positions[:, None]).view(-1)
        mask = self.mask[:, None, None, :span]

        def attend(layer: int, qkv: Tensor) -> Tensor:
            new = qkv[:, config.num_heads :].reshape(-1, config.head_dim)
            self._slots[layer].index_copy_(0, slots, new)
            # heads that share keys are computed as several queries of one head
            shape = n_rows, config.kv_heads, -1, config.head_dim
            q = qkv[:, : config.num_heads].view(shape)
            k, v = self._keys[layer].narrow(2, 0, span), self._values[layer].narrow(2, 0, span)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(n_rows, -1)

        turns = None if self.turns is None else self.turns[positions]
        x = self._features(ids, turns, attend)
        if config.intra_document_masking:
            assert self.end_id is not None  # else `read` fails
            self.mask.masked_fill_((ids == self.end_id)[:, None], -torch.inf)
        self.positions.add_(1)
        return x @ self.head

    def _features(
        self, ids: Int[Tensor, " N"], turns: Tensor | None, attend: Attend
    ) -> Float[Tensor, "N C"]:
        """Return the input of the head; `turns` (N, D / 2) rotate each row to its position."""
        x = F.embedding(ids, self.embeddings)
        for i, layer in enumerate(self.layers):
            first, second = layer.norms
            match self.config.norm_position:
                case "pre":
                    qkv = self._heads(layer, self._norm(x, first), turns)
                    x = torch.addmm(x, attend(i, qkv), layer.output)
                    x = torch.addmm(x, _activated(layer, self._norm(x, second)), layer.down)
                case "post":
                    qkv = self._heads(layer, x, turns)
                    x = self._norm(torch.addmm(x, attend(i, qkv), layer.output), first)
                    x = self._norm(torch.addmm(x, _activated(layer, x), layer.down), second)
                case _:
                    assert_never(self.config.norm_position)
        return self._norm(x, self.final_norm)

    def _heads(
        self, layer: _Layer, x: Float[Tensor, "N C"], turns: Tensor | None
    ) -> Float[Tensor, "N heads D"]:
        """Return the heads of q, k and v, with q and k normalized and rotated."""
        config = self.config
        qkv = (x @ layer.qkv).view(len(x), -1, config.head_dim)
        qk = qkv[:, : config.num_heads + config.kv_heads]
        if layer.qk_norm is not None:
            qk.copy_(F.rms_norm(qk, (config.head_dim,), eps=config.norm_eps) * layer.qk_norm)
        if turns is not None:  # the pairs (2i, 2i + 1) are complex numbers, a rotation is a product
            exact = qk.float()  # qk itself if it is float32
            torch.view_as_complex(exact.view(*qk.shape[:2], -1, 2)).mul_(turns[:, None])
            if exact is not qk:
                qk.copy_(exact)
        return qkv

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """Return lm.model.kernels.rms_norm; the mean is a product, which takes half the time."""
        if weight is None:
            return x
        exact = x.float()
        by_rms = torch.addmm(self.eps, exact.square(), self.averages).rsqrt_()
        return (exact * by_rms).mul_(weight).to(x.dtype)


def _activated(layer: _Layer, x: Float[Tensor, "N C"]) -> Float[Tensor, "N F"]:
    """Return the input of the feed-forward layer's last matrix."""
    function, gated, _ = layer.activation
    h = x @ layer.up
    return function(*h.chunk(2, dim=1)) if gated else function(h)


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream for all captures: cuBLAS keeps memory for each stream."""
    return torch.cuda.Stream(device)


@contextmanager
def _one_kernel_to_copy() -> Iterator[None]:
    """Leave deterministic mode: in it, on a GPU, index_copy_ sorts the places and may wait.

    No two places are the same, so the result does not depend on the order.
    """
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


@torch.inference_mode()
def require_same_logits(
    model: TransformerLM, text: Sequence[int] | NDArray[Any], end_id: int | None
) -> None:
    """Raise InputError unless a Decoder gives the model's logits for the first ids of a text.

    The first half of the ids is read, each other one is a step. This finds a change of the model's
    code that the decoder lacks. Logits that are not finite pass: the callers report them better.
    """
    n_ids = min(COMPARED, model.config.context_length)
    ids = torch.tensor([int(i) for i in text[:n_ids]], device=model.head.device)
    half = -(-len(ids) // 2)
    decoder = Decoder(model, 1, end_id)
    logits = [decoder.read([0], [ids[:half].tolist()])]
    logits += [decoder.step(column) for column in ids[half:, None]]
    expected = model(ids[None], model.documents(ids[None], end_id))[0, half - 1 :]
    if not expected.isfinite().all():
        return
    difference, largest = (t.abs().max().item() for t in (torch.cat(logits) - expected, expected))
    if not difference <= TOLERANCE * largest:
        raise InputError(
            "lm/generate/decoder.py computes another model than lm/model/transformer.py: over "
            f"{len(ids)} ids logits of up to {largest:.1e} differ by {difference:.1e}, more than "
            f"{TOLERANCE:.0e} of the largest; make the same change in both files"
        )
