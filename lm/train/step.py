"""One step: forward, backward, clip, update.

    x, y -> micro-batches -> loss_of -> gradients_of -> gradients of the batch -> clip -> optimizer

State is the model, the optimizer, the step and, for float16, the loss scaler. Batch, learning
rate and dropout are pure functions of (seed, step), so nothing else has to be saved. Each of
several processes takes its windows of the batch; parallel.py runs their backward passes and adds up
the gradients of all.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import assert_never

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from lm.base import rng
from lm.base.settings import BY_TREE, PARALLEL, Dtype, TrainConfig
from lm.machine.device import autocast, compiled
from lm.machine.processes import Processes
from lm.model.transformer import Ids, TransformerLM
from lm.train.diagnose import diagnose_nonfinite
from lm.train.optim import gradient_clipping
from lm.train.parallel import BatchGradients, LossOf, Replicated, Sharded, own_micro_batches
from lm.train.recover import retry_with_smaller_micro_batches
from lm.train.state import Record, TrainState

# model, x, y, weight of the loss -> loss, gradients of weight x loss by each parameter
Gradients = Callable[[TransformerLM, Tensor, Tensor, Tensor], tuple[Tensor, tuple[Tensor, ...]]]


def train_step(
    state: TrainState, config: TrainConfig, x: Ids, y: Ids, gradients: BatchGradients
) -> Record:
    """Update the parameters once; x and y are this process's windows of the batch.

    Raises Diverged, and changes neither parameters nor optimizer, if loss or norm is not finite.
    """
    while True:
        own_losses = forward_backward(state, config, x, y, gradients)
        grad_norm = clipped_norm(state, config).item()
        losses = state.processes.gather_numbers(own_losses.tolist()).astype(np.float32)  # by rank
        loss = mean_loss(losses.T if gradients.alternating else losses)
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
    numbers, size = own_numbers(state, config, gradients), state.micro_batch_size
    count = len(numbers) * state.processes.size  # micro-batches of the batch
    weight = state.scaler.scale(torch.ones((), device=x.device)) / count
    losses = []
    for number, micro_x, micro_y in zip(numbers, x.split(size), y.split(size), strict=True):
        if state.model.config.dropout:
            torch.manual_seed(rng.seed(config.seed, "dropout", state.step, number))
        losses.append(gradients.add(micro_x, micro_y, weight, last=number == numbers[-1]))
    state.scaler.unscale_(state.optimizer)
    return torch.stack(losses)


def clipped_norm(state: TrainState, config: TrainConfig) -> Tensor:
    """Clip the gradients of the batch; return their norm before, a scalar on the device."""
    max_norm = math.inf if config.max_grad_norm is None else config.max_grad_norm
    by_rows = PARALLEL[config.parallel].sharded or BY_TREE[config.reduction]
    return gradient_clipping(state.model.parameters(), max_norm, by_rows)


def own_numbers(state: TrainState, config: TrainConfig, gradients: BatchGradients) -> range:
    """Return the numbers, in the batch, of the micro-batches that this process computes."""
    count = config.batch_size // state.micro_batch_size
    return own_micro_batches(count, state.processes, gradients.alternating)


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


class OneProcess(BatchGradients):
    """The only process: forward and backward pass are one function, which a compiler sees whole."""

    def __init__(self, model: TransformerLM, backward: Gradients, tree: bool, overwrites: bool):
        """With `overwrites`, each call of `backward` overwrites what the last one returned."""
        super().__init__(model, tree)
        self.backward, self.overwrites = backward, overwrites
        self.parameters = tuple(model.parameters())

    def add(self, x: Tensor, y: Tensor, weight: Tensor, last: bool) -> Tensor:
        """See BatchGradients."""
        loss, gradients = self.backward(self.model, x, y, weight)
        if self.overwrites and not last:  # nothing reads the last ones after the step
            loss = loss.clone()
            if self.tree or self.parameters[0].grad is None:  # later ones are added at once
                gradients = tuple(gradient.clone() for gradient in gradients)
        if self.tree:
            self.sums.add(list(gradients))
            if not last:
                return loss
            gradients = tuple(self.sums.take()[0])
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return loss


def make_gradients(
    model: TransformerLM, config: TrainConfig, processes: Processes, end_id: int | None
) -> BatchGradients:
    """Return what computes the gradients of a batch, as train.parallel and train.compile say."""
    device, tree = model.head.device, BY_TREE[config.reduction]

    def forward(model: TransformerLM, x: Tensor, y: Tensor) -> Tensor:
        return loss_of(model, x, y, config.dtype, end_id)

    def backward(
        model: TransformerLM, x: Tensor, y: Tensor, weight: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return gradients_of(forward, model, x, y, weight)

    match config.parallel:
        case "none":
            cuda_graph = False
            if config.compile and config.gradient_checkpointing:
                # together, forward and backward would keep what checkpointing drops; so large a
                # model is not limited by launches
                forward = compiled(forward, device)
            elif config.compile:
                cuda_graph = device.type == "cuda"
                backward = compiled(backward, device, cuda_graph)
            return OneProcess(model, backward, tree, overwrites=cuda_graph)
        case "ddp":
            return Replicated(model, forward, processes, tree)
        case "fsdp":
            return Sharded(model, forward, tree)
        case other:
            assert_never(other)


def mean_loss(losses: NDArray[np.float32]) -> float:
    """Return the mean over all micro-batches, added one by one in float32 in their order."""
    total = np.float32(0)
    for loss in losses.ravel():
        total += loss / np.float32(losses.size)
    return float(total)
