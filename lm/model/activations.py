"""The activations of the feed-forward layer: the values of the setting `model.ffn`.

A new one needs nothing but its entry here: model, decoder, plan and settings read ACTIVATIONS.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from lm.model.kernels import swiglu


class Activation(NamedTuple):
    """A function and its costs."""

    function: Callable[..., Tensor]  # of w1 x; gated: of w1 x and w3 x
    gated: bool  # there is a third matrix, w3
    kept: int  # (B, T, F) tensors that the backward pass needs, the function's result included

    @property
    def matrices(self) -> int:
        """Return how many matrices the layer has."""
        return 2 + self.gated


ACTIVATIONS = {
    "swiglu": Activation(swiglu, gated=True, kept=3),  # Shazeer 2020, eq. 6
    "silu": Activation(F.silu, gated=False, kept=2),
}
