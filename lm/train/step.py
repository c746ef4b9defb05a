"""One step: forward, backward, clip, update.

    x, y -> micro-batches -> loss_of -> gradients_of -> accumulator -> clip -> optimizer

State is the model, the optimizer, the step and, for float16, the loss scaler. Batch, learning
rate and dropout are pure functions of (seed, step), so nothing else has to be saved. The
accumulator adds up the gradients of all micro-batches (accumulate.py). With several processes each
takes its windows of the batch, and theirs are added up too (parallel.py).
"""

import math
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from lm.base import rng
from lm.base.settings import BY_TREE, PARALLEL, Dtype, TrainConfig
from lm.machine.device import autocast
from lm.model.transformer import Ids, TransformerLM
from lm.train.diagnose import diagnose_nonfinite
from lm.train.optim import gradient_clipping
from lm.train.parallel import GradientAccumulator, LossOf, own_micro_batches
from lm.train.recover import retry_with_smaller_micro_batches
from lm.train.state import Record, TrainState


def train_step(
    state: TrainState, config: TrainConfig, x: Ids, y: Ids, accumulator: GradientAccumulator
) -> Record:
    """Update the parameters once; x and y are this process's windows of the batch.

    Raises Diverged, and changes neither parameters nor optimizer, if loss or norm is not finite.
    """
    while True:
        own_losses = forward_backward(state, config, x, y, accumulator)
        grad_norm = clipped_norm(state, config).item()
        losses = state.processes.gather_numbers(own_losses.tolist()).astype(np.float32)  # by rank
        loss = mean_loss(losses.T if accumulator.alternating else losses)
        overflow = math.isfinite(loss) and not math.isfinite(grad_norm)
        if not (overflow and state.scaler.get_scale() > 1):
            break
        state.scaler.update()  # the scale was too large for float16: lower it and compute again
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        again = partial(forward_backward, state, config, x, y, accumulator)
        raise diagnose_nonfinite(state, losses, loss, grad_norm, accumulator, again)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.step += 1
    return {"step": state.step, "train_loss": loss, "grad_norm": grad_norm}


@retry_with_smaller_micro_batches
def forward_backward(
    state: TrainState, config: TrainConfig, x: Tensor, y: Tensor, accumulator: GradientAccumulator
) -> Tensor:
    """Set each .grad to the whole batch's; return the losses (n,) of own micro-batches, in nats."""
    state.optimizer.zero_grad(set_to_none=True)
    numbers, size = own_numbers(state, config, accumulator), state.micro_batch_size
    count = len(numbers) * state.processes.size  # micro-batches of the batch
    weight = state.scaler.scale(torch.ones((), device=x.device)) / count
    losses = []
    for number, micro_x, micro_y in zip(numbers, x.split(size), y.split(size), strict=True):
        if state.model.config.dropout:
            torch.manual_seed(rng.seed(config.seed, "dropout", state.step, number))
        losses.append(accumulator.add(micro_x, micro_y, weight, last=number == numbers[-1]))
    state.scaler.unscale_(state.optimizer)
    return torch.stack(losses)


def clipped_norm(state: TrainState, config: TrainConfig) -> Tensor:
    """Clip the gradients of the batch; return their norm before, a scalar on the device."""
    max_norm = math.inf if config.max_grad_norm is None else config.max_grad_norm
    by_rows = PARALLEL[config.parallel].sharded or BY_TREE[config.reduction]
    return gradient_clipping(state.model.parameters(), max_norm, by_rows)


def own_numbers(state: TrainState, config: TrainConfig, accumulator: GradientAccumulator) -> range:
    """Return the numbers, in the batch, of the micro-batches that this process computes."""
    count = config.batch_size // state.micro_batch_size
    return own_micro_batches(count, state.processes, accumulator.alternating)


def loss_of(
    model: TransformerLM, x: Ids, y: Ids, dtype: Dtype, end_id: int | None
) -> Float[Tensor, ""]:
    """Run a micro-batch forward; return its loss, in nats."""
    with autocast(x.device, dtype):
        return model.loss(x, y, model.documents(x, end_id))


def gradients_of(
    forward: LossOf, model: TransformerLM, x: Ids, y: Ids, weight: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a micro-batch forward and backward; return its loss, and the gradients of weight x loss.

    There is one gradient for each parameter, in their order.
    """
    loss = forward(model, x, y)
    return loss.detach(), torch.autograd.grad(loss * weight, tuple(model.parameters()))


def mean_loss(losses: NDArray[np.float32]) -> float:
    """Return the mean over all micro-batches, added one by one in float32 in their order."""
    total = np.float32(0)
    for loss in losses.ravel():
        total += loss / np.float32(losses.size)
    return float(total)
