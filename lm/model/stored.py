"""Check that stored tensors are the weights of a model, before any of its weights is changed.

A hash shows that a file is as it was written, not that it makes sense: torch loads integers in
place of weights silently, and a model with NaN among its weights still makes text.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lm.base.errors import InputError
from lm.machine.sharded_tensors import local
from lm.model.transformer import ModelConfig

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # become float32 without loss


class Stored(NamedTuple):
    """Shape and type of a tensor in a file, as its header says."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def require_settings(name: str, config: ModelConfig, stored: Mapping[str, Stored]) -> None:
    """Raise InputError if the sizes in the settings are not those of the stored weights.

    Call it before building the model: settings may ask for any amount of memory.
    """

    def matrix(key: str) -> tuple[int, ...]:
        shape = stored[key].shape if key in stored else ()
        return shape if len(shape) == 2 else (0, 0)

    layers = {key.split(".")[1] for key in stored if key.startswith("layers.")}
    found = {"num_layers": len(layers), "d_ff": matrix("layers.0.ffn.w1.weight")[0]}
    found["vocab_size"], found["d_model"] = matrix("token_embeddings.weight")
    if differing := [
        f"{key} = {getattr(config, key)} in its settings, {number or 'none'} in its weights"
        for key, number in found.items()
        if getattr(config, key) != number
    ]:
        raise InputError(f"{name}: another model: {', '.join(differing)}")


def require_weights(
    name: str,
    own: Mapping[str, Tensor],
    stored: Mapping[str, Stored],
    dtypes: tuple[torch.dtype, ...] | None = None,
) -> None:
    """Raise InputError unless names, shapes and types of the stored tensors are the model's.

    `dtypes` are the types that are allowed; None: the model's own alone.
    """
    for key in sorted(own.keys() | stored.keys()):
        here = tuple(own[key].shape) if key in own else "nothing"
        there = stored[key].shape if key in stored else "nothing"
        if here != there:
            raise InputError(f"{name}: another model: {key} is {there}, expected {here}")
        allowed = dtypes or (own[key].dtype,)
        if stored[key].dtype not in allowed:
            expected = " or ".join(map(word_of, allowed))
            raise InputError(f"{name}: {key} is {word_of(stored[key].dtype)}, expected {expected}")


def word_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype, e.g. "float32"."""
    return str(dtype).removeprefix("torch.")


def require_finite(name: str, tensors: Mapping[str, Tensor], keys: Iterable[str]) -> None:
    """Raise InputError if one of the tensors `keys` of file `name` is not finite."""
    for key in keys:
        tensor = local(tensors[key])
        if tensor.is_floating_point() and not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise InputError(f"{name}: {key}: {count} of {tensor.numel()} values are not finite")
        if key.endswith(".step") and (tensor < 0).any():
            raise InputError(f"{name}: {key} is negative")


def finite_keys(model: nn.Module, stored: Iterable[str]) -> list[str]:
    """Return the names of stored tensors that must be finite: all but buffers, such as a mask."""
    buffers = {f"model.{key}" for key, _ in model.named_buffers()}
    return [key for key in stored if key not in buffers]


def as_stored(tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """Return shape and type of each tensor."""
    return {key: Stored(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
