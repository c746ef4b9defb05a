"""An excerpt of a split, token by token: its loss, and the most probable tokens."""

import codecs
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lm.data.splits import Split
from lm.data.tokenizer import Tokenizer
from lm.machine.device import to_device
from lm.model.transformer import TransformerLM

MAX_TOKENS, MAX_GUESSES = 1500, 5
SEARCHED = 1 << 20  # tokens at the start of the split in which documents are searched
MAX_CHARACTERS = 100  # of a token that are shown: BPE makes one token of a long run of spaces


@dataclass(frozen=True)
class ScoredToken:
    """A token of a document, and how well the model predicted it."""

    text: str  # the characters that it completes: none before the last byte of a character
    name: str  # the token by itself; bytes that are no character as \\xc3
    loss_nats: float
    guesses: list[tuple[str, float]]  # names and probabilities of the most probable tokens


@dataclass(frozen=True)
class ScoredDocument:
    """A document of the split, or its beginning."""

    whole: bool
    tokens: list[ScoredToken]


@torch.no_grad()
def excerpt(model: TransformerLM, split: Split, tokenizer: Tokenizer) -> list[ScoredDocument]:
    """Score the first documents of a split that fit as a whole, or else the start of the split.

    Each document is read after an end token, as in generation. Past the context length each token
    is predicted from at least half a context. The model must be in evaluation mode.
    """
    found = []
    for ids, whole in _chosen(split):
        characters = codecs.getincrementaldecoder("utf-8")("replace")
        tokens = []
        for target, logits in zip(ids.tolist(), _logits(model, ids, tokenizer.end_id), strict=True):
            log_p = F.log_softmax(logits.double(), dim=0)
            best = log_p.topk(min(MAX_GUESSES, len(log_p)))
            guesses = zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
            text = characters.decode(tokenizer.decode_bytes([target]))
            tokens.append(
                ScoredToken(
                    _cut(text),
                    _name(tokenizer, target),
                    round(-log_p[target].item(), 4),
                    [(_name(tokenizer, guess), round(p, 4)) for guess, p in guesses],
                )
            )
        found.append(ScoredDocument(whole, tokens))
    return found


def _chosen(split: Split) -> list[tuple[NDArray[Any], bool]]:
    """Return the ids of each document of the excerpt, and whether the document is whole."""
    ids = split.tokens[:SEARCHED]
    room, chosen = MAX_TOKENS, []
    for document in np.split(ids, np.flatnonzero(ids == split.end_id) + 1)[:-1]:
        if 1 < len(document) <= room:  # one id is the end token of an empty document
            chosen.append((document, True))
            room -= len(document)
    return chosen or [(ids[:MAX_TOKENS], False)]


def _logits(model: TransformerLM, ids: NDArray[Any], end_id: int) -> Iterator[torch.Tensor]:
    """Yield the logits (V,) that predict each id, on the CPU."""
    length, device = model.config.context_length, next(model.parameters()).device
    read = np.concatenate([[end_id], ids[:-1]]).astype(np.int64)
    done = 0
    while done < len(ids):
        start = max(0, done - length // 2) if len(ids) > length else 0
        x = to_device(read[None, start : start + length], device)  # (1, T)
        logits = model(x, documents=model.documents(x, end_id))[0]  # (T, V)
        yield from logits[done - start :].cpu()
        done = start + x.shape[1]


def _name(tokenizer: Tokenizer, token_id: int) -> str:
    try:
        return _cut(tokenizer.decode_bytes([token_id]).decode("utf-8", "backslashreplace"))
    except KeyError:  # a vocabulary that was not made here may have gaps
        return f"id {token_id}"


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + "…"


def excerpt_json(documents: list[ScoredDocument]) -> bytes:
    """Return the documents as JSON with one token a line."""
    parts = []
    for document in documents:
        tokens = ",\n".join(json.dumps(asdict(t), ensure_ascii=False) for t in document.tokens)
        parts.append(f'{{"whole": {json.dumps(document.whole)}, "tokens": [\n{tokens}\n]}}')
    return f"[{', '.join(parts)}]\n".encode()
