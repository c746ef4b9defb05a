"""What a training holds, computes and sends, by arithmetic on its settings.

    parameters, flops_per_token     numbers and products by part of the model
    activations                     bytes that the backward pass needs, by part
    peak_memory                     bytes by part at the fullest moment of a step
    communication                   bytes that a process sends for an update, by part

Letters in shapes as in lm.model.transformer, and N = B T tokens at once.
"""

import math
from collections import Counter

import torch

from lm.base.settings import ModelConfig, TrainConfig, share_of_batch
from lm.model.activations import ACTIVATIONS
from lm.model.kernels import attention_blocks, rows_at_once
from lm.model.loss import validation_logits
from lm.train.optim import OPTIMIZERS

# Fitted to measured peaks of processes on a CPU. Where they stop fitting, this fails:
#   pytest tests/test_plan.py -k within_a_tenth
# and every run writes planned beside measured bytes into metrics/performance.json.
# The heap grows to 1.3 to 1.7 times of what is alive at once (nine shapes, glibc 2.36): glibc asks
# for more in order to align, so a hole is too small for what has left it.
HEAP = 1.45
HOLES = 0.55  # of each block that is computed again, as its input stays between
# Of each block whose weights came and went, with gloo: -8 to +18 % over ten shapes; but a tree over
# several micro-batches takes 40 % more than planned (docs/LOG.md, "The plan").
GATHERED_HOLES = 2.0
KERNEL_BYTES = 20e6  # of torch's libraries, in memory once they have been used
# torch's compiler in the process, once it has been used; or imported, which some of torch does
COMPILER_BYTES, IMPORTED_COMPILER_BYTES = 120e6, 75e6


def parameters(model: ModelConfig) -> dict[str, int]:
    """Trainable numbers by part; a tied embedding counts as the embedding."""
    C, D = model.d_model, model.head_dim
    layers, vocabulary = model.num_layers, model.vocab_size * model.d_model
    norms = 2 * layers + (model.norm_position == "pre")
    norm_sizes = norms * C * (model.norm == "rmsnorm") + layers * 2 * D * model.qk_norm
    return {
        "embedding": vocabulary,
        "attention": layers * (2 * C * C + 2 * C * model.kv_heads * D),
        "feed-forward": layers * _matrices(model) * C * model.d_ff,
        "norms": norm_sizes,
        "head": 0 if model.tie_embeddings else vocabulary,
    }


def _matrices(model: ModelConfig) -> int:
    return ACTIVATIONS[model.ffn].matrices


def flops_per_token(
    model: ModelConfig, config: TrainConfig, device: torch.device
) -> dict[str, tuple[float, float]]:
    """(forward, backward) of the matrix products that are computed, by part; all else is left out.

    2 for each weight forward and 4 backward; gradient checkpointing adds the blocks' forward pass
    to the backward one. The head makes its gradients with the loss: 2 and 4 all the same.
    Attention multiplies twice forward and, where the scores were not kept but are computed again,
    five times backward, else four. Queries see all T keys; compiled on a CPU, blocks of them see
    the keys up to their end. Kernels that skip what causality hides (CUDA; a CPU beyond 512 keys)
    compute less than is counted. TransformerLM.flops_per_token, of which MFU is made, is instead
    the field's convention: always T keys, four products backward, nothing twice.
    """
    sizes = parameters(model)
    again = config.gradient_checkpointing
    product = (
        2.0 * model.num_layers * model.d_model * model.context_length * _seen(config, model, device)
    )

    def of_weights(count: float) -> tuple[float, float]:
        return 2.0 * count, (4.0 + 2.0 * again) * count

    return {
        "attention projections": of_weights(sizes["attention"]),
        "attention products": (2 * product, ((4 if model.dropout else 5) + 2 * again) * product),
        "feed-forward": of_weights(sizes["feed-forward"]),
        "head": (2.0 * model.vocab_size * model.d_model, 4.0 * model.vocab_size * model.d_model),
    }


def _seen(config: TrainConfig, model: ModelConfig, device: torch.device) -> float:
    """The share of all pairs of query and key that is multiplied: see causal_attention."""
    length = model.context_length
    if config.compile is not True or device.type != "cpu" or model.dropout:
        return 1.0
    return sum((end - start) * end for start, end in attention_blocks(length)) / length**2


def activations(model: ModelConfig, config: TrainConfig, micro_batch_size: int) -> dict[str, float]:
    """Bytes that the forward pass keeps for the backward pass, by part, when it comes to the head.

    What autograd keeps: of a norm its input and one number a row; of a product its input, once for
    each matrix where autocast makes a copy for each; of attention queries, keys, values (repeated
    for each head), result and one number a query, or with dropout the weights three times; of
    SwiGLU both sides and their product.
    """
    N, C, F = micro_batch_size * model.context_length, model.d_model, model.d_ff
    a = 4 if config.dtype == "float32" else 2
    casts = a == 2 and config.compile is not True
    normed, activation = model.norm == "rmsnorm", ACTIVATIONS[model.ffn]
    kv_width = model.kv_heads * model.head_dim
    # a norm's output is input to a product; without norm that input is the residual stream itself
    norms = normed * 2 * (4 * N * C + 4 * N)
    into = N * C * a * ((3 if casts else 1) + (2 if casts and activation.gated else 1))
    if not normed and a == 4:
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
        "norms and residuals": norms + into + dropped,
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
    final = (4 * N * C + 4 * N) * (normed and model.norm_position == "pre")
    casted = a * (parameters(model)["attention"] + parameters(model)["feed-forward"]) * (a == 2)
    total["final norm, ids"] = final + 16 * N + 4 * N * C * (model.dropout > 0)
    total["weights in " + config.dtype] = casted
    return {part: float(size) for part, size in total.items() if size}


def _head(model: ModelConfig, config: TrainConfig, micro_batch_size: int) -> dict[str, float]:
    """Bytes at the fullest moment of linear_cross_entropy: its last chunk's exponentials.

    Eager: the logits, their distance from the largest, its exponential, and the exponential of
    the chunk before; the gradients by the features and, of each chunk, by the weights.
    """
    N, C, V = micro_batch_size * model.context_length, model.d_model, model.vocab_size
    a = 4 if config.dtype == "float32" else 2
    rows = rows_at_once(N, V)
    chunks, logits = -(-N // rows), rows * V
    if config.compile is True and config.parallel == "none":  # else blocks alone are compiled
        copies = 2 * a  # the pointwise operations are one loop
    else:
        copies = a + 4 + 4 + a * (chunks > 1) + (4 if a == 2 else 0)
    by_weights = (max(1, chunks - 1) * a + 4 * (a == 2)) * V * C
    return {
        "logits, at once": float(logits * copies),
        "gradients of the head": float(4 * N * C + by_weights),
    }


def batch_bytes(model: ModelConfig, config: TrainConfig, share: int) -> float:
    """Bytes of an update's token ids, x and y of a process's share, and of drawing its windows."""
    return 16.0 * share * model.context_length + 50.0 * config.batch_size


def _through_a_block(model: ModelConfig, config: TrainConfig, micro_batch_size: int) -> float:
    """Bytes of the gradients that are alive together on the way back through a block."""
    N, a = micro_batch_size * model.context_length, 4 if config.dtype == "float32" else 2
    return 8.0 * N * model.d_model + _matrices(model) * N * model.d_ff * a


def optimizer_bytes(model: ModelConfig, config: TrainConfig, shards: int) -> tuple[float, float]:
    """Return (state, scratch of an update) of one process, with the state shared by `shards`."""
    sizes, optimizer = parameters(model), OPTIMIZERS[config.optimizer]
    matrices = sizes["attention"] + sizes["feed-forward"]
    others = sum(sizes.values()) - matrices
    state = 4 * (optimizer.matrix_numbers * matrices + optimizer.other_numbers * others) / shards
    if not optimizer.whole_matrices:
        return state, 0
    # every matrix's direction; the largest stack of equal ones in float32, and thrice in bfloat16
    scratch = 4.0 * matrices + 10 * max(sizes["attention"], sizes["feed-forward"])
    if config.parallel == "fsdp":  # one whole matrix at a time, and what is sent and received of it
        largest = max(rows * columns for rows, columns in _shapes(model))
        scratch = 4 * matrices / shards + (10 + 4 + 4) * largest
    return state, scratch


def _shapes(model: ModelConfig) -> Counter[tuple[int, int]]:
    """How many matrices of each shape (rows, columns) the blocks have."""
    C, F, layers = model.d_model, model.d_ff, model.num_layers
    count: Counter[tuple[int, int]] = Counter()
    count[C, C] += 2 * layers
    count[model.kv_heads * model.head_dim, C] += 2 * layers
    count[F, C] += (_matrices(model) - 1) * layers
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
    """Bytes by part at the fullest moment: of torch on a GPU, of one process on a CPU.

    The moments: at the head, when all activations are kept; at the end of the backward pass; in
    the update; in a validation. A process on a CPU also holds the copy from which checkpoints are
    written, what its heap cannot use again, `base_bytes` and, if it compiles, the compiler.

    Of several processes under fsdp each holds a share of weights and optimizer state, and, one
    after the other, whole blocks: see _gathered. The first one also puts the state together in the
    end, in the memory of its host. Rows that do not divide are not shared evenly: where there are
    few to a process, the first ones hold up to a row of each matrix more than is told here.
    """
    at_once = share_of_batch(config, num_processes) // micro_batch_size
    shards = num_processes if config.parallel == "fsdp" else 1
    whole = 4.0 * sum(parameters(model).values())
    weights = whole / shards
    state, scratch = optimizer_bytes(model, config, shards)
    gathered, sent = _gathered(model, config)
    before, after, reduced = _gradients(model, config, shards, at_once)
    kept = activations(model, config, micro_batch_size)
    again = kept.pop("one block again", 0.0)
    vocabulary = 4.0 * model.vocab_size * model.d_model
    lost = GATHERED_HOLES * (gathered > 0) * model.num_layers * _root_and_block(model)[1]
    lost *= device.type == "cpu"
    moments: list[dict[str, float]] = [
        {
            "activations": sum(kept.values()),
            **_head(model, config, micro_batch_size),
            "gradients": before,
            "gathered weights": gathered,
            "heap, lost between blocks": lost,
        },
        {
            "activations": sum(kept.values()) + again,
            "gradients": before + vocabulary + sent,
            "gathered weights": gathered,
            "gradients by activations": _through_a_block(model, config, micro_batch_size),
            "heap, lost between blocks": lost
            + HOLES * model.num_layers * again * (device.type == "cpu"),
        },
        {"gradients": after, "gathered weights": gathered},
        {"gradients": reduced, "update": scratch},
        {
            "gradients": reduced,
            "gathered weights": gathered,
            "validation's logits": validation_logits(model, config.dtype, micro_batch_size),
        },
    ]
    if config.parallel == "fsdp" and device.type == "cpu":
        moments.append({"state put together": whole + state * shards})
    fullest = max(moments, key=lambda moment: sum(moment.values()))
    parts = {"weights": weights, "optimizer state": state} | fullest
    if device.type == "cpu":
        if config.eval_interval < config.max_steps:  # a first best is saved before the end
            parts["checkpoint's copy"] = weights + state
        parts["heap, lost between"] = (HEAP - 1) * sum(parts.values())
        parts["interpreter and torch"] = base_bytes + KERNEL_BYTES
        if config.compile is True:
            parts["compiler"] = COMPILER_BYTES
        elif config.gradient_checkpointing or config.parallel != "none":
            parts["compiler"] = IMPORTED_COMPILER_BYTES
    return {part: size for part, size in parts.items() if size}


def _root_and_block(model: ModelConfig) -> tuple[float, float]:
    """Bytes in float32 of what fully_shard gathers at once: the root's own weights, a block's."""
    total = sum(parameters(model).values())
    in_root = model.vocab_size * model.d_model * (1 if model.tie_embeddings else 2)
    in_root += model.d_model * (model.norm == "rmsnorm" and model.norm_position == "pre")
    return 4.0 * in_root, 4.0 * (total - in_root) / model.num_layers


def _gathered(model: ModelConfig, config: TrainConfig) -> tuple[float, float]:
    """Bytes under fsdp of whole weights, and of whole gradients that are on their way.

    Weights: the root's throughout, a block's while it computes and the next one's. Gradients: a
    block's, and the copy of it that is being sent.
    """
    if config.parallel != "fsdp":
        return 0.0, 0.0
    root, block = _root_and_block(model)
    return root + 2 * block, 2 * block


def _gradients(
    model: ModelConfig, config: TrainConfig, shards: int, micro_batches: int
) -> tuple[float, float, float]:
    """Bytes of gradients before the last micro-batch of a process, after it and in the update.

    A sum over a tree holds one part for each of its levels. DDP's gradients lie in its buckets at
    all times. FSDP sends them at the last micro-batch, and until then holds whole ones, or over
    a tree at every one, and holds shares.
    """
    whole = 4.0 * sum(parameters(model).values())
    tree = config.reduction == "tree"
    levels = math.log2(micro_batches)
    before = levels if tree else float(micro_batches > 1)
    if config.parallel == "none":
        return before * whole, (1 + before) * whole, whole
    if config.parallel == "ddp":
        in_buckets = whole * (1 + levels * tree)
        return in_buckets, in_buckets, whole
    share, (root, _) = whole / shards, _root_and_block(model)
    after = (1 + levels * tree) * share + 2 * root  # the root's are sent last
    return before * (share if tree else whole), after, share


def communication(
    model: ModelConfig, config: TrainConfig, num_processes: int, micro_batches: int
) -> dict[str, float]:
    """Bytes that a process sends for an update, by part; it receives as many.

    Of B bytes a ring sends (N - 1) / N B in a reduce-scatter or an all-gather and, as nothing can
    do with less, twice that in an all-reduce, which is both (Patarasuk and Yuan 2009). So DDP sends
    2 (N - 1) / N B; gathering each block in the forward and the backward pass makes it three
    halves of that (Rajbhandari et al. 2020, section 7.2), less what the root keeps, and is done
    for each micro-batch. All is float32, 4 bytes a number. Over a tree each process adds up a
    share of the gradients that an all-to-all has brought: as many bytes as a reduce-scatter, but
    under fsdp for each micro-batch. Muon's matrices go to one process each, N of a shape at a time,
    and come back as rows in bfloat16; where there are fewer, places stay empty but are sent. Norms
    of gradients, losses and validations are left out.
    """
    others = (num_processes - 1) / num_processes
    whole = others * 4.0 * sum(parameters(model).values())
    tree = config.reduction == "tree"
    if config.parallel != "fsdp":
        if not tree:
            return {"all-reduce of gradients": 2 * whole}
        return {"all-to-all of gradients": whole, "all-gather of gradients": whole}
    root, block = _root_and_block(model)
    gathered = others * (root + 2 * model.num_layers * block)
    sent = {"all-gather of weights": micro_batches * gathered}
    sent["all-to-all of gradients" if tree else "reduce-scatter of gradients"] = whole * (
        micro_batches if tree else 1
    )
    if OPTIMIZERS[config.optimizer].whole_matrices:
        numbers = sum(
            rows * columns * -(-count // num_processes)
            for (rows, columns), count in _shapes(model).items()
        )
        sent["all-to-all of Muon"] = others * (4.0 + 2.0) * numbers
    return sent
