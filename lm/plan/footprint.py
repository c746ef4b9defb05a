"""Work out what a training holds, computes and sends, by arithmetic on its settings.

    parameters, flops_per_token     numbers and products by part of the model
    activations                     bytes that the backward pass needs, by part
    peak_memory                     bytes by part at the fullest moment of a step
    communication                   bytes that a process sends in a step, by part

Letters in shapes as in lm.model.transformer, and N = B T, the tokens of a micro-batch. A choice
that stands in no table or match here is an error.
"""

import math
from collections import Counter
from typing import assert_never

import torch

from lm.base.settings import BY_TREE, DTYPES, PARALLEL, ModelConfig, TrainConfig, share_of_batch
from lm.model.activations import ACTIVATIONS
from lm.model.kernels import LOGITS_AT_ONCE, attention_blocks, rows_at_once
from lm.train.optim import OPTIMIZERS

# Fitted to processes on a CPU: `python -m benchmarks.plan` measures each again and prints planned
# beside measured bytes, as each run does in metrics/performance.json. Where they stop fitting,
# `pytest tests/test_plan.py -k within_a_tenth` fails.
HEAP = 1.45  # the heap's size, in bytes in use: glibc leaves holes too small for later blocks
HOLES = 0.55  # lost, of the bytes of a block that is computed again: its input stays behind
# lost, of the weights of a block, which come and go, with gloo: -8 to +18 % over ten shapes; a tree
# over several micro-batches takes 40 % more than planned (docs/LOG.md, "The plan")
GATHERED_HOLES = 2.0
KERNEL_BYTES = 20e6  # of torch's libraries once they have been used
COMPILER_BYTES = 120e6  # of torch's compiler once it has been used
IMPORTED_COMPILER_BYTES = 75e6  # the same only imported, as parts of torch do

NORMS = {  # by norm and norm_position: norms in each block, norms behind the last block
    ("rmsnorm", "pre"): (2, 1),
    ("rmsnorm", "post"): (2, 0),
    ("none", "pre"): (0, 0),
    ("none", "post"): (0, 0),
}


def parameters(model: ModelConfig) -> dict[str, int]:
    """Return the trainable numbers by part; a tied embedding counts as the embedding."""
    C, D, L = model.d_model, model.head_dim, model.num_layers
    norms, last_norms = NORMS[model.norm, model.norm_position]
    return {
        "embedding": model.vocab_size * C,
        "attention": L * (2 * C * C + 2 * C * model.kv_heads * D),
        "feed-forward": L * ACTIVATIONS[model.ffn].matrices * C * model.d_ff,
        "norms": (L * norms + last_norms) * C + L * 2 * D * model.qk_norm,
        "head": 0 if model.tie_embeddings else model.vocab_size * C,
    }


def flops_per_token(
    model: ModelConfig, config: TrainConfig, device: torch.device
) -> dict[str, tuple[float, float]]:
    """Return (forward, backward) FLOPs of the matrix products, by part; all else is left out.

    Each weight takes 2 forward and 4 backward; gradient checkpointing adds the blocks' forward pass
    to the backward one. The head makes its gradients with the loss: still 2 and 4.
    Attention multiplies twice forward and, where the scores were not kept but are computed again,
    five times backward, else four. Queries see all T keys; compiled on a CPU, blocks of them see
    the keys up to their end. Kernels that skip what causality hides (CUDA; a CPU beyond 512 keys)
    compute less than is counted. TransformerLM.flops_per_token, from which MFU is computed, is the
    field's convention instead: always T keys, four products backward, nothing computed twice.
    """
    sizes, T = parameters(model), model.context_length
    again = config.gradient_checkpointing
    pairs = float(T * T)  # of query and key that are multiplied: see causal_attention
    if config.compile and device.type == "cpu" and not model.dropout:
        pairs = float(sum((end - start) * end for start, end in attention_blocks(T)))
    product = 2 * model.num_layers * model.d_model * pairs / T
    head = model.vocab_size * model.d_model

    def of_weights(count: float) -> tuple[float, float]:
        return 2.0 * count, (4.0 + 2.0 * again) * count

    return {
        "attention projections": of_weights(sizes["attention"]),
        "attention products": (2 * product, ((4 if model.dropout else 5) + 2 * again) * product),
        "feed-forward": of_weights(sizes["feed-forward"]),
        "head": (2.0 * head, 4.0 * head),
    }


def activations(model: ModelConfig, config: TrainConfig, micro_batch_size: int) -> dict[str, float]:
    """Return the bytes that the forward pass has kept for the backward pass at the head, by part.

    Autograd keeps for a norm its input and one number a row; for a product its input, once for each
    matrix where autocast copies it for each; for attention queries, keys, values (repeated for each
    head), result and one number a query, or with dropout the weights three times; for SwiGLU both
    sides and their product.
    """
    N, C, F = micro_batch_size * model.context_length, model.d_model, model.d_ff
    dtype, activation = DTYPES[config.dtype], ACTIVATIONS[model.ffn]
    a, casts = dtype.size_bytes, dtype.autocast and not config.compile
    norms, last_norms = NORMS[model.norm, model.norm_position]
    kv_width = model.kv_heads * model.head_dim
    # a norm's output is input to a product; without norm that input is the residual stream itself
    into = N * C * a * ((3 if casts else 1) + (2 if casts and activation.gated else 1))
    if not norms and not dtype.autocast:
        into = 2 * N * C * 4
    attention = 4.0 * N * C * a + 4 * N * model.num_heads
    if model.dropout:  # in float32 whatever the dtype
        attention = N * C * (12.0 + a) + 12 * model.num_heads * N * model.context_length
    elif model.intra_document_masking:
        attention += N * model.context_length * a
    if model.qk_norm:
        attention += a * N * (C + kv_width) + 4 * N * (model.num_heads + model.kv_heads)
    dropped = 2 * N * C * a * (model.dropout > 0)
    block = {
        "norms and residuals": norms * (4 * N * C + 4 * N) + into + dropped,
        "attention": attention,
        "feed-forward": float(activation.kept * N * F * a),
    }
    layers = model.num_layers
    total = {part: layers * size for part, size in block.items()}
    if config.gradient_checkpointing:
        mask = N * model.context_length * model.intra_document_masking
        total = {
            "blocks' inputs": layers * N * C * 4 + mask,
            "one block again": sum(block.values()),
        }
    sizes = parameters(model)
    casted = a * (sizes["attention"] + sizes["feed-forward"]) * dtype.autocast
    final = last_norms * (4 * N * C + 4 * N) + 4 * N * C * (model.dropout > 0)
    total["final norm, ids"] = final + 16 * N
    total["weights in " + config.dtype] = casted
    return {part: float(size) for part, size in total.items() if size}


def _head(model: ModelConfig, config: TrainConfig, micro_batch_size: int) -> dict[str, float]:
    """Return the bytes at the fullest moment of linear_cross_entropy: at its last exponentials.

    Uncompiled these are the logits, their distance from the largest, its exponential, and the
    exponential of the chunk before; the gradients by the features and, for each chunk, the weights.
    """
    N, C, V = micro_batch_size * model.context_length, model.d_model, model.vocab_size
    dtype, rows = DTYPES[config.dtype], rows_at_once(N, V)
    a = dtype.size_bytes
    chunks = -(-N // rows)
    if config.compile and not PARALLEL[config.parallel].several:  # not blocks alone
        copies = 2 * a  # the pointwise operations are one loop
    else:
        copies = a + 4 + 4 + a * (chunks > 1) + 4 * dtype.autocast
    by_weights = (max(1, chunks - 1) * a + 4 * dtype.autocast) * V * C
    return {
        "logits, at once": float(rows * V * copies),
        "gradients of the head": float(4 * N * C + by_weights),
    }


def _validation_logits(count: int, vocab_size: int) -> float:
    """Return the bytes of the logits that a validation holds: in float32, and their log-softmax."""
    return 8.0 * min(count, max(1, LOGITS_AT_ONCE // vocab_size)) * vocab_size


def batch_bytes(model: ModelConfig, config: TrainConfig, share: int) -> float:
    """Return the bytes of a process's token ids in a step, x and y, and of drawing windows."""
    return 16.0 * share * model.context_length + 50.0 * config.batch_size


def _optimizer(model: ModelConfig, config: TrainConfig, shares: int) -> tuple[float, float]:
    """Return the bytes of (state, scratch of an update) of one of `shares`."""
    sizes, kind = parameters(model), OPTIMIZERS[config.optimizer]
    matrices = sizes["attention"] + sizes["feed-forward"]
    others = sum(sizes.values()) - matrices
    state = 4 * (kind.matrix_numbers * matrices + kind.other_numbers * others) / shares
    if PARALLEL[config.parallel].sharded:
        largest = max(rows * columns for rows, columns in _shapes(model))
        return state, kind.kept_bytes * matrices / shares + (
            kind.stacked_bytes + kind.exchanged_bytes
        ) * largest
    stack = max(sizes["attention"], sizes["feed-forward"])
    return state, kind.kept_bytes * matrices + kind.stacked_bytes * stack


def _shapes(model: ModelConfig) -> Counter[tuple[int, int]]:
    """Return the number of matrices of each shape (rows, columns) in the blocks."""
    C, F, layers = model.d_model, model.d_ff, model.num_layers
    count: Counter[tuple[int, int]] = Counter()
    count[C, C] += 2 * layers
    count[model.kv_heads * model.head_dim, C] += 2 * layers
    count[F, C] += (ACTIVATIONS[model.ffn].matrices - 1) * layers
    count[C, F] += layers
    return count


def peak_memory(
    model: ModelConfig,
    config: TrainConfig,
    device: torch.device,
    micro_batch_size: int,
    base_bytes: int,
    num_processes: int = 1,
) -> dict[str, float]:
    """Return the bytes at the fullest moment by part: of torch on a GPU, of a process on a CPU.

    The moments: at the head, when all activations are kept; at the end of the backward pass; in
    the update; in a validation. A process on a CPU also holds the copy from which checkpoints are
    written, what its heap cannot use again, `base_bytes` and, if it compiles, the compiler.

    Under fsdp each process holds a share of weights and optimizer state, and, one after the other,
    whole blocks: see _root_and_block. In the end the first process also puts the state together, in
    the memory of its host. Rows are not always shared evenly: the first processes may hold one row
    of each matrix more, which is left out here.
    """
    N, a = micro_batch_size * model.context_length, DTYPES[config.dtype].size_bytes
    on_cpu, fsdp = device.type == "cpu", PARALLEL[config.parallel].sharded
    at_once = share_of_batch(config, num_processes) // micro_batch_size
    shares = num_processes if fsdp else 1
    whole = 4.0 * sum(parameters(model).values())
    weights = whole / shares
    state, scratch = _optimizer(model, config, shares)
    root, block = _root_and_block(model)
    # whole weights: the root's throughout, a block's while it computes and the next one's; whole
    # gradients: a block's, and the copy of it that is being sent
    gathered, sent = (root + 2 * block, 2 * block) if fsdp else (0.0, 0.0)
    lost = GATHERED_HOLES * model.num_layers * block * (fsdp and on_cpu)
    before, after, reduced = _gradients(model, config, shares, at_once)
    kept = activations(model, config, micro_batch_size)
    again = kept.pop("one block again", 0.0)
    through_a_block = N * (8.0 * model.d_model + ACTIVATIONS[model.ffn].matrices * model.d_ff * a)
    head = _head(model, config, micro_batch_size)
    # the memory of a CUDA graph serves nothing else
    graph = config.compile and device.type == "cuda" and not config.gradient_checkpointing
    graph &= not PARALLEL[config.parallel].several
    by_graph = graph * (sum(kept.values()) + sum(head.values()))
    moments: list[dict[str, float]] = [
        {
            "activations": sum(kept.values()),
            **head,
            "gradients": before,
            "gathered weights": gathered,
            "heap, lost between blocks": lost,
        },
        {
            "activations": sum(kept.values()) + again,
            "gradients": before + 4.0 * model.vocab_size * model.d_model + sent,
            "gathered weights": gathered,
            "gradients by activations": through_a_block,
            "heap, lost between blocks": lost + HOLES * model.num_layers * again * on_cpu,
        },
        {"gradients": after, "gathered weights": gathered},
        {"gradients": reduced, "update": scratch, "kept by the CUDA graph": by_graph},
        {
            "gradients": reduced,
            "kept by the CUDA graph": by_graph,
            "gathered weights": gathered,
            "validation's logits": _validation_logits(N, model.vocab_size),
        },
    ]
    if fsdp and on_cpu:
        moments.append({"state put together": whole + state * shares})
    fullest = max(moments, key=lambda moment: sum(moment.values()))
    parts = {"weights": weights, "optimizer state": state} | fullest
    if on_cpu:
        if config.eval_interval < config.max_steps:  # a first best is saved before the end
            parts["checkpoint's copy"] = weights + state
        parts["heap, lost between"] = (HEAP - 1) * sum(parts.values())
        parts["interpreter and torch"] = base_bytes + KERNEL_BYTES
        if config.compile:
            parts["compiler"] = COMPILER_BYTES
        elif config.gradient_checkpointing or PARALLEL[config.parallel].several:
            parts["compiler"] = IMPORTED_COMPILER_BYTES
    return {part: size for part, size in parts.items() if size}


def _root_and_block(model: ModelConfig) -> tuple[float, float]:
    """Return the bytes in float32 that fully_shard gathers at once: the root's own, a block's."""
    sizes = parameters(model)
    _, last_norms = NORMS[model.norm, model.norm_position]
    root = sizes["embedding"] + sizes["head"] + last_norms * model.d_model
    return 4.0 * root, 4.0 * (sum(sizes.values()) - root) / model.num_layers


def _gradients(
    model: ModelConfig, config: TrainConfig, shares: int, micro_batches: int
) -> tuple[float, float, float]:
    """Return the bytes of gradients before and after the last micro-batch, and in the update.

    A sum over a tree holds one part for each of its levels. DDP's gradients lie in its buckets at
    all times. FSDP sends them at the last micro-batch, and until then holds whole ones, or over
    a tree at every one, and holds shares.
    """
    whole = 4.0 * sum(parameters(model).values())
    by_tree, levels = BY_TREE[config.reduction], math.log2(micro_batches)
    before = levels if by_tree else float(micro_batches > 1)
    match config.parallel:
        case "none":
            return before * whole, (1 + before) * whole, whole
        case "ddp":
            in_buckets = whole * (1 + levels * by_tree)
            return in_buckets, in_buckets, whole
        case "fsdp":
            share, (root, _) = whole / shares, _root_and_block(model)
            after = (1 + levels * by_tree) * share + 2 * root  # the root's are sent last
            return before * (share if by_tree else whole), after, share
        case _:
            assert_never(config.parallel)


def communication(
    model: ModelConfig, config: TrainConfig, num_processes: int, micro_batches: int
) -> dict[str, float]:
    """Return the bytes that a process sends in a step, by part; it receives as many.

    For B bytes a ring sends (N - 1) / N B in a reduce-scatter or an all-gather, and twice that in
    an all-reduce, which is both; less is not possible (Patarasuk and Yuan 2009). So DDP sends
    2 (N - 1) / N B; gathering each block in the forward and the backward pass makes it three
    halves of that (Rajbhandari et al. 2020, section 7.2), less what the root keeps, for each
    micro-batch. All is float32, 4 bytes a number. Over a tree each process adds up a share of the
    gradients that an all-to-all has brought: as many bytes as a reduce-scatter, but under fsdp for
    each micro-batch. For an optimizer of whole matrices each matrix goes to one process and comes
    back, N of a shape at a time; where fewer are left, empty places are sent too. Norms of
    gradients, losses and validations are left out.
    """
    others = (num_processes - 1) / num_processes
    whole = others * 4.0 * sum(parameters(model).values())
    by_tree = BY_TREE[config.reduction]
    match config.parallel:
        case "none" | "ddp" if by_tree:
            return {"all-to-all of gradients": whole, "all-gather of gradients": whole}
        case "none" | "ddp":
            return {"all-reduce of gradients": 2 * whole}
        case "fsdp":
            root, block = _root_and_block(model)
            gathered = others * (root + 2 * model.num_layers * block)
        case _:
            assert_never(config.parallel)
    gradients = "all-to-all of gradients" if by_tree else "reduce-scatter of gradients"
    sent = {
        "all-gather of weights": micro_batches * gathered,
        gradients: whole * (micro_batches if by_tree else 1),
    }
    if bytes_sent := OPTIMIZERS[config.optimizer].sent_bytes:
        numbers = sum(
            rows * columns * -(-count // num_processes)
            for (rows, columns), count in _shapes(model).items()
        )
        sent[f"all-to-all of {config.optimizer}"] = others * bytes_sent * numbers
    return sent
