"""The model once more, in float64 and plain loops, from the papers' formulas alone; and BPE."""

import heapq
import math
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np


def rms_norm(x, weight, eps):
    return x / math.sqrt(sum(v * v for v in x) / len(x) + eps) * weight


def rotate(x, position, theta):
    """RoFormer, eq. 15: features 2i and 2i + 1 turn by position * theta^(-2i/D)."""
    result = np.array(x)
    for i in range(0, len(x), 2):
        turned = complex(x[i], x[i + 1]) * np.exp(1j * position * theta ** (-i / len(x)))
        result[i], result[i + 1] = turned.real, turned.imag
    return result


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


def silu(x):
    return x / (1 + np.exp(-x))


def attention(x, weights, prefix, config):
    n_groups = config.num_heads // config.kv_heads
    size = config.head_dim
    q, k, v = (x @ weights[f"{prefix}.{name}_proj.weight"].T for name in "qkv")
    mixed = np.zeros((len(x), config.num_heads * size))

    def prepare(rows, head, name):
        out = []
        for position, row in enumerate(rows):
            part = row[head * size : (head + 1) * size]
            if config.qk_norm:
                part = rms_norm(part, weights[f"{prefix}.{name}_norm.weight"], config.norm_eps)
            if config.position_embedding == "rope":
                part = rotate(part, position, config.rope_theta)
            out.append(part)
        return np.array(out)

    for head in range(config.num_heads):
        group = head // n_groups
        queries, keys = prepare(q, head, "q"), prepare(k, group, "k")
        values = v[:, group * size : (group + 1) * size]
        for t in range(len(x)):
            scores = [queries[t] @ keys[s] / math.sqrt(size) for s in range(t + 1)]
            mixed[t, head * size : (head + 1) * size] = softmax(np.array(scores)) @ values[: t + 1]
    return mixed @ weights[f"{prefix}.output_proj.weight"].T


def feed_forward(x, weights, prefix, config):
    hidden = silu(x @ weights[f"{prefix}.w1.weight"].T)
    if config.ffn == "swiglu":
        hidden = hidden * (x @ weights[f"{prefix}.w3.weight"].T)
    return hidden @ weights[f"{prefix}.w2.weight"].T


def transformer(ids, model):
    """Logits (T, V) of one sequence, in float64."""
    config = model.config
    weights = {name: w.detach().double().numpy() for name, w in model.state_dict().items()}

    def norm(x, name):
        if config.norm == "none":
            return x
        return np.array([rms_norm(row, weights[f"{name}.weight"], config.norm_eps) for row in x])

    x = weights["token_embeddings.weight"][list(ids)]
    for i in range(config.num_layers):
        layer = f"layers.{i}"
        if config.norm_position == "pre":
            x = x + attention(norm(x, f"{layer}.ln1"), weights, f"{layer}.attn", config)
            x = x + feed_forward(norm(x, f"{layer}.ln2"), weights, f"{layer}.ffn", config)
        else:
            x = norm(x + attention(x, weights, f"{layer}.attn", config), f"{layer}.ln1")
            x = norm(x + feed_forward(x, weights, f"{layer}.ffn", config), f"{layer}.ln2")
    if config.norm_position == "pre":
        x = norm(x, "ln_final")
    head = "token_embeddings.weight" if config.tie_embeddings else "lm_head.weight"
    return x @ weights[head].T


def train_bpe(words, count, first_ids, tie):
    """BPE, incremental: the merges learnt from `words` (bytes to how often), `count` at most.

    `first_ids` numbers the 256 bytes; of equally frequent pairs of ids the smallest `tie(pair,
    tokens)` is merged first. A token that two merges make keeps its first id.
    """
    tokens = {i: bytes([byte]) for byte, i in first_ids.items()}
    ids = {token: i for i, token in tokens.items()}
    parts = [[first_ids[byte] for byte in word] for word in words]
    weights = list(words.values())
    counts, places = Counter(), defaultdict(set)
    for place, (word, weight) in enumerate(zip(parts, weights, strict=True)):
        for pair in pairwise(word):
            counts[pair] += weight
            places[pair].add(place)
    heap = [(-n, tie(pair, tokens), pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < count:
        n, _, pair = heapq.heappop(heap)
        if counts[pair] != -n or n == 0:
            continue  # counted anew since: a later entry says so
        left, right = tokens[pair[0]], tokens[pair[1]]
        merges.append((left, right))
        new = ids.setdefault(left + right, len(ids))
        tokens[new] = left + right
        changed = set()
        for place in places.pop(pair):
            before, after, i = parts[place], [], 0
            while i < len(before):
                found = tuple(before[i : i + 2]) == pair
                after.append(new if found else before[i])
                i += 2 if found else 1
            for old in pairwise(before):
                counts[old] -= weights[place]
                changed.add(old)
            for made in pairwise(after):
                counts[made] += weights[place]
                places[made].add(place)
                changed.add(made)
            parts[place] = after
        for other in changed:
            if counts[other] > 0:
                heapq.heappush(heap, (-counts[other], tie(other, tokens), other))
    return merges
