"""One step: forward, backward, clip, update.

    x, y -> micro-batches -> model -> loss -> gradients of the batch -> clip -> optimizer

State is the model, the optimizer, the step and, for float16, the loss scaler. Batch, learning
rate and dropout are pure functions of (seed, step), so nothing else has to be saved. Each of
several processes takes its windows of the batch, and parallel.py adds up the gradients of all.
"""

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from lm.base import rng
from lm.base.settings import TrainConfig as TrainConfig
from lm.base.settings import WindowOrder
from lm.data.batches import Split, TokenStream
from lm.machine.device import to_device
from lm.train.diagnose import diagnose_nonfinite
from lm.train.optim import gradient_clipping
from lm.train.parallel import BatchGradients, own_micro_batches
from lm.train.recover import retry_with_smaller_micro_batches
from lm.train.state import Record, TrainState


def train_step(
    state: TrainState,
    config: TrainConfig,
    x: Int[Tensor, "B T"],
    y: Int[Tensor, "B T"],
    gradients: BatchGradients,
) -> Record:
    """Update the parameters once; x and y are this process's windows of the batch.

    Raises Diverged, and changes neither parameters nor optimizer, if loss or norm is not finite.
    """
    max_norm = math.inf if config.max_grad_norm is None else config.max_grad_norm
    by_rows = config.parallel == "fsdp" or config.reduction == "tree"
    while True:
        own_losses = forward_backward(state, config, x, y, gradients)
        grad_norm = gradient_clipping(state.model.parameters(), max_norm, by_rows).item()
        losses = state.processes.gather_numbers(own_losses.tolist()).astype(np.float32)  # by rank
        loss = _mean(losses.T if gradients.alternating else losses)
        overflow = math.isfinite(loss) and not math.isfinite(grad_norm)
        if not (overflow and state.scaler.get_scale() > 1):
            break
        state.scaler.update()  # the scale was too large for float16: lower it, and again
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        again = partial(forward_backward, state, config, x, y, gradients)
        raise diagnose_nonfinite(state, losses, loss, grad_norm, gradients, again)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.step += 1
    return {"step": state.step, "train_loss": loss, "grad_norm": grad_norm}


@retry_with_smaller_micro_batches
def forward_backward(
    state: TrainState, config: TrainConfig, x: Tensor, y: Tensor, gradients: BatchGradients
) -> Tensor:
    """Fill the gradients of the whole batch; return own micro-batches' losses (n,), in nats."""
    state.optimizer.zero_grad(set_to_none=True)
    size = state.micro_batch_size
    count = config.batch_size // size  # micro-batches of all processes
    numbers = own_micro_batches(count, state.processes, gradients.alternating)
    weight = state.scaler.scale(torch.ones((), device=x.device)) / count
    losses = []
    for number, micro_x, micro_y in zip(numbers, x.split(size), y.split(size), strict=True):
        if state.model.config.dropout:
            torch.manual_seed(rng.seed(config.seed, "dropout", state.step, number))
        losses.append(gradients.add(micro_x, micro_y, weight, last=number == numbers[-1]))
    state.scaler.unscale_(state.optimizer)
    return torch.stack(losses)


def _mean(losses: NDArray[np.float32]) -> float:
    """Return the mean over all micro-batches, added one by one in float32 in their order."""
    total = np.float32(0)
    for loss in losses.ravel():
        total += loss / np.float32(losses.size)
    return float(total)


def get_batch(
    dataset: NDArray[Any] | TokenStream,
    batch_size: int,
    context_length: int,
    device: str | torch.device,
    *,
    seed: int | None = None,
    step: int = 0,
    sampling: WindowOrder = "random",
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Return windows of a 1-D array of token ids, and the same one token later, on the device.

    With a seed, a pure function of (seed, step); without one, the seed is drawn from torch's
    global generator. Raises InputError if the dataset is shorter than one window.
    """
    if seed is None:
        seed = int(torch.randint(2**62, ()).item())
    x, y = Split("dataset", dataset, 0).batch(step, batch_size, context_length, seed, sampling)
    return to_device(x, torch.device(device)), to_device(y, torch.device(device))
