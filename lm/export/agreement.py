"""Compare the logits of transformers with ours before an export."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm.base.errors import InputError
from lm.model.transformer import TransformerLM

TOLERANCE = 1e-4  # of logits


@torch.inference_mode()
def compared(
    model: TransformerLM, settings: dict[str, Any], weights: dict[str, Tensor], text: list[int]
) -> str:
    """Return how well the logits agree over a full context of random ids and one of text.

    If they differ by more than TOLERANCE, compute both again in float64, which changes `model`.
    Raises AssertionError if they still differ: a bug of ours.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM  # for development alone
    except ImportError:
        return "transformers is not installed: logits not compared"
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).eval()
    lacking, surplus = theirs.load_state_dict(weights, strict=False)
    tied = ["lm_head.weight"] if model.config.tie_embeddings else []
    assert (lacking, surplus) == (tied, [])
    length = model.config.context_length
    random = np.random.default_rng(0).integers(model.config.vocab_size, size=length)
    ids = torch.from_numpy(np.stack([random, np.resize(text, length)]))
    logits = model(ids)
    if not logits.isfinite().all():
        raise InputError(
            "the logits are not finite: weights are too large; train with a lower train.lr"
        )
    difference = (logits - theirs(ids).logits).abs().max().item()
    said = f"Logits agree with those of transformers to {difference:.1e}"
    if not difference <= TOLERANCE:  # a long context: they round the angles of rotary positions
        assert model.rope is not None
        cos, sin = theirs.model.rotary_emb(ids.float(), torch.arange(length)[None])  # (1, T, D)
        model.rope.cos.copy_(cos[0, :, : cos.shape[-1] // 2])
        model.rope.sin.copy_(sin[0, :, : sin.shape[-1] // 2])
        exact = (model.double()(ids) - theirs.double()(ids).logits).abs().max().item()
        assert exact <= TOLERANCE, f"{said}, and to {exact:.1e} where nothing is rounded"
        said += f", all of it rounding: to {exact:.1e} in float64 with their rotary angles"
    return said
