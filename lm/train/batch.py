"""Make a batch for a loop written by hand; the loop of a run, in loop.py, makes its own."""

from typing import Any

import torch
from numpy.typing import NDArray

from lm.base.settings import WindowOrder
from lm.data.splits import Split
from lm.data.token_stream import TokenStream
from lm.machine.device import to_device
from lm.model.transformer import Ids


def get_batch(
    dataset: NDArray[Any] | TokenStream,
    batch_size: int,
    context_length: int,
    device: str | torch.device,
    *,
    seed: int | None = None,
    step: int = 0,
    sampling: WindowOrder = "random",
) -> tuple[Ids, Ids]:
    """Return windows (B, T) of a 1-D array of ids and the same one token later, on the device.

    With a seed they are a function of (seed, step); without one, a seed is drawn from torch's
    global generator. Raises InputError if the dataset is shorter than one window.
    """
    if seed is None:
        seed = int(torch.randint(2**62, ()).item())
    x, y = Split("dataset", dataset, 0).batch(step, batch_size, context_length, seed, sampling)
    return to_device(x, torch.device(device)), to_device(y, torch.device(device))
