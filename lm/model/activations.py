"""What a feed-forward layer computes between its matrices: the values of the setting `model.ffn`.

An entry is all that a new activation needs: the model, the decoder, the plan and the check of
settings read it here.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from lm.model.kernels import swiglu


class Activation(NamedTuple):
    """The function, and what depends on it."""

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
