"""Training: one step, and the loop as a stream of records.

    Split.batch(step) -> x, y -> model -> cross_entropy -> backward -> clip -> optimizer

State is the model, the optimizer, the step and, for float16, the loss scaler. Batch, learning
rate and dropout are pure functions of (seed, step), so nothing else has to be saved. Of several
processes each takes its windows of the batch, and lm.train.parallel adds up the gradients of all.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from lm.base import rng
from lm.base.console import count, say
from lm.base.errors import Diverged, EnvironmentFault, is_out_of_memory
from lm.base.settings import Sampling
from lm.base.settings import TrainConfig as TrainConfig
from lm.data.batches import Split, TokenStream
from lm.machine.device import autocast, compiled, to_device
from lm.model.transformer import TransformerLM
from lm.train.diagnose import _nonfinite, _origin
from lm.train.optim import gradient_clipping
from lm.train.parallel import Alone, Backward, Replicated, Sharded, own_micro_batches
from lm.train.schedule import learning_rate_fraction
from lm.train.state import Record, TrainState


def get_batch(
    dataset: NDArray[Any] | TokenStream,
    batch_size: int,
    context_length: int,
    device: str | torch.device,
    *,
    seed: int | None = None,
    step: int = 0,
    sampling: Sampling = "random",
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Windows of a 1-D array of token ids, and the same one token later, on the device.

    With a seed, a pure function of (seed, step); without one, the seed is drawn from torch's
    global generator. Raises InputError if the dataset is shorter than one window.
    """
    if seed is None:
        seed = int(torch.randint(2**62, ()).item())
    x, y = Split("dataset", dataset, 0).batch(step, batch_size, context_length, seed, sampling)
    return to_device(x, torch.device(device)), to_device(y, torch.device(device))


def _backward_of(state: TrainState, config: TrainConfig, end_id: int | None) -> Backward:
    """How the gradients of a micro-batch are made, and added to those of others."""
    device, tree = state.model.head.device, config.reduction == "tree"

    def loss_of(model: TransformerLM, x: Tensor, y: Tensor) -> Tensor:
        with autocast(device, config.dtype):
            return model.loss(x, y, model.documents(x, end_id))

    def gradients_of(
        model: TransformerLM, x: Tensor, y: Tensor, weight: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = loss_of(model, x, y)
        return loss.detach(), torch.autograd.grad(loss * weight, tuple(model.parameters()))

    if config.parallel == "ddp":
        return Replicated(state.model, loss_of, state.processes, tree)
    if config.parallel == "fsdp":
        return Sharded(state.model, loss_of, tree)
    if config.compile is True and config.gradient_checkpointing:
        loss_of = compiled(loss_of, device)  # one graph of both cannot compute anything again
    elif config.compile is True:
        gradients_of = compiled(gradients_of, device)
    return Alone(state.model, gradients_of, tree)


def _own_micro_batches(state: TrainState, config: TrainConfig, backward: Backward) -> range:
    """The numbers of the micro-batches of a batch that this process computes."""
    count = config.batch_size // state.windows_at_once
    return own_micro_batches(count, state.processes, backward.alternating)


def train_step(
    state: TrainState,
    x: Int[Tensor, "B T"],
    y: Int[Tensor, "B T"],
    config: TrainConfig,
    backward: Backward,
) -> Record:
    """One update: schedule, forward, loss, backward, clip, step; x and y are this process's.

    Raises Diverged, and changes neither parameters nor optimizer, if loss or norm is not finite.
    """
    fraction = learning_rate_fraction(state.step + 1, config)
    for group in state.optimizer.param_groups:
        group["lr"] = fraction * group["initial_lr"]
    accumulate = partial(_accumulated, state, x, y, config, backward)
    losses, grad_norm = _clipped_gradients(state, config, accumulate)
    loss = _mean(losses.T if backward.alternating else losses)
    while math.isfinite(loss) and not math.isfinite(grad_norm) and state.scaler.get_scale() > 1:
        state.scaler.update()  # the scale was too large for float16: lower it, and again
        losses, grad_norm = _clipped_gradients(state, config, accumulate)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        state.scaler.update()
        backward.watching, backward.spoilt = True, False
        _backward(state, config, accumulate)  # clipping by nan has made nan of all
        backward.watching = False
        state.scaler.update()
        name, value = ("gradient norm", grad_norm) if math.isfinite(loss) else ("loss", loss)
        raise Diverged(
            f"{name} is {value} at step {state.step + 1}{_origin(state, losses, backward)}; "
            f"{_nonfinite(state)}"
        )
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.step += 1
    return {
        "step": state.step,
        "train_loss": loss,
        "learning_rate": fraction * config.lr,
        "grad_norm": grad_norm,
    }


def _mean(losses: NDArray[np.float32]) -> float:
    """Of the micro-batches of a batch, in nats, added one by one in float32 as they stand."""
    total = np.float32(0)
    for loss in losses.ravel():
        total += loss / np.float32(losses.size)
    return float(total)


def _clipped_gradients(
    state: TrainState, config: TrainConfig, accumulate: Callable[[], Tensor]
) -> tuple[NDArray[np.float32], float]:
    """Fill the clipped gradients of the whole batch; returns the losses by rank, and their norm.

    The losses (N, n), in nats, are of the n micro-batches that each of the N processes took.
    """
    losses = _backward(state, config, accumulate)
    limit = math.inf if config.max_grad_norm is None else config.max_grad_norm
    by_rows = config.parallel == "fsdp" or config.reduction == "tree"
    grad_norm = gradient_clipping(state.model.parameters(), limit, by_rows).item()
    return state.processes.gather_numbers(losses.tolist()).astype(np.float32), grad_norm


def _backward(state: TrainState, config: TrainConfig, accumulate: Callable[[], Tensor]) -> Tensor:
    """Fill the gradients of the whole batch; returns the losses of this process's micro-batches.

    Out of memory, it begins again with smaller micro-batches, unless their size is set.
    """
    while True:
        try:
            return accumulate()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        _take_fewer_windows(
            state, config, state.model.head.device
        )  # here, where nothing holds the tensors


def _take_fewer_windows(state: TrainState, config: TrainConfig, device: torch.device) -> None:
    """Lower state.windows_at_once to the next divisor of this process's share, at most half of it.

    Raises EnvironmentFault if the size is set, is one window already, or others compute with it.
    """
    before = state.windows_at_once
    share = config.batch_size // state.processes.size
    fewer = next((n for n in range(before // 2, 0, -1) if share % n == 0), None)
    if config.micro_batch_size is not None or fewer is None or config.parallel != "none":
        smaller = f"train.micro_batch_size: {fewer}" if fewer else "a smaller model"
        raise EnvironmentFault(
            f"out of memory on {device} with {count(before, 'window')} at a time; try {smaller} "
            "or train.gradient_checkpointing: true"
        )
    state.windows_at_once = fewer
    state.optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    say(
        f"Out of memory on {device} with {count(before, 'window')} at a time: step "
        f"{state.step + 1} again and the rest with {fewer}"
    )


def _accumulated(
    state: TrainState, x: Tensor, y: Tensor, config: TrainConfig, backward: Backward
) -> Tensor:
    """Sum the gradients of all processes' micro-batches; returns the losses of mine, (n,)."""
    state.optimizer.zero_grad(set_to_none=True)
    numbers, size = _own_micro_batches(state, config, backward), state.windows_at_once
    count = config.batch_size // size
    weight = state.scaler.scale(torch.ones((), device=x.device)) / count
    losses = []
    for number, micro_x, micro_y in zip(numbers, x.split(size), y.split(size), strict=True):
        if state.model.config.dropout:
            torch.manual_seed(rng.seed(config.seed, "dropout", state.step, number))
        losses.append(backward(micro_x, micro_y, weight, last=number == numbers[-1]))
    state.scaler.unscale_(state.optimizer)
    return torch.stack(losses)
