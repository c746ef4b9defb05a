"""The excerpt against the model asked directly, one token at a time."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from lm.data.splits import Split
from lm.data.tokenizer import byte_tokenizer
from lm.evaluate import excerpt as excerpts
from lm.evaluate.excerpt import excerpt, excerpt_json
from lm.model.transformer import TransformerLM

TOKENIZER = byte_tokenizer()


@pytest.fixture
def bytes_model(model_config):
    torch.manual_seed(0)
    return TransformerLM(replace(model_config, vocab_size=TOKENIZER.end_id + 1)).eval()


def split_of(*texts):
    ids = [i for text in texts for i in (*TOKENIZER.encode(text), TOKENIZER.end_id)]
    return Split("valid", np.array(ids, dtype=np.uint16), 0, end_id=TOKENIZER.end_id)


@pytest.mark.parametrize("text", ["short", "past the context of sixteen tokens, twice and more"])
def test_losses_and_guesses_are_the_model_s_own(bytes_model, text):
    (document,) = excerpt(bytes_model, split_of(text), TOKENIZER)
    ids = [TOKENIZER.end_id, *TOKENIZER.encode(text), TOKENIZER.end_id]
    assert len(document.tokens) == len(ids) - 1
    for place, token in enumerate(document.tokens, start=1):
        start = 0 if place <= 16 else (place - 1) // 8 * 8 - 8  # windows of 16 that advance by 8
        logits = bytes_model(torch.tensor([ids[start:place]]))[0, -1].double()
        p = torch.softmax(logits, 0)
        assert token.loss_nats == pytest.approx(-p[ids[place]].log().item(), abs=2e-4)
        ranked = sorted(p.tolist(), reverse=True)[:5]
        assert [q for _, q in token.guesses] == pytest.approx(ranked, abs=2e-4)
        best = p.argmax().item()
        name = bytes([best]).decode("utf-8", "backslashreplace")
        assert token.guesses[0][0] == ("<|endoftext|>" if best == TOKENIZER.end_id else name)


def test_a_character_appears_with_its_last_byte(bytes_model):
    text = "né €🙂"
    (document,) = excerpt(bytes_model, split_of(text), TOKENIZER)
    shown = [token.text for token in document.tokens]
    assert shown == ["n", "", "é", " ", "", "", "€", "", "", "", "🙂", "<|endoftext|>"]
    names = [token.name for token in document.tokens]
    assert names[:4] == ["n", r"\xc3", r"\xa9", " "]


def test_whole_documents_are_preferred_and_the_size_is_bounded(bytes_model, monkeypatch):
    monkeypatch.setattr(excerpts, "MAX_TOKENS", 20)
    found = excerpt(bytes_model, split_of("x" * 30, "", "second", "y" * 18, "third"), TOKENIZER)
    texts = ["".join(token.text for token in document.tokens) for document in found]
    assert texts == ["second<|endoftext|>", "third<|endoftext|>"]
    assert all(document.whole for document in found)
    (start,) = excerpt(bytes_model, split_of("z" * 30), TOKENIZER)
    assert (start.whole, len(start.tokens)) == (False, 20)
    read = json.loads(excerpt_json([start]))
    assert [token["loss_nats"] for token in read[0]["tokens"]] == [
        token.loss_nats for token in start.tokens
    ]
