"""Training: one step, and the loop as a stream of records.

    Split.batch(step) -> x, y -> model -> cross_entropy -> backward -> clip -> optimizer

State is the model, the optimizer, the step and, for float16, the loss scaler. Batch, learning
rate and dropout are pure functions of (seed, step), so nothing else has to be saved.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor, nn

from lm import rng
from lm.config import POSITIVE, SEED, Count
from lm.device import Dtype, autocast, compiled, to_device
from lm.errors import Diverged, EnvironmentFault, InputError, is_out_of_memory
from lm.model import ModelConfig, TransformerLM, cross_entropy
from lm.optim import OPTIMIZERS, AdamW, OptimizerConfig, gradient_clipping
from lm.schedule import ScheduleConfig, learning_rate_fraction
from lm.tokens import Sampling, Split

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ScheduleConfig, OptimizerConfig):
    """The section `train`."""

    seed: Annotated[int, SEED]
    batch_size: Count  # windows per update
    micro_batch_size: Count | None  # windows per backward pass; null: all
    max_grad_norm: Annotated[float, POSITIVE] | None
    sampling: Sampling
    dtype: Dtype
    compile: bool
    gradient_checkpointing: bool
    eval_interval: Count  # steps between two validations
    eval_batches: Count  # batches of a validation, spread over the split
    early_stopping: Count | None  # validations without a new best before stopping

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.windows_at_once:
            raise InputError(
                f"train.batch_size = {self.batch_size} is not a multiple of "
                f"train.micro_batch_size = {self.micro_batch_size}"
            )

    @property
    def windows_at_once(self) -> int:
        """Windows per backward pass."""
        return self.batch_size if self.micro_batch_size is None else self.micro_batch_size


@dataclass
class TrainState:
    """Everything that a step changes."""

    model: TransformerLM
    optimizer: AdamW
    scaler: torch.amp.GradScaler  # does nothing unless the dtype is float16
    step: int = 0


def new_state(model_config: ModelConfig, config: TrainConfig, device: torch.device) -> TrainState:
    """The state before the first step: a function of the settings and the seed."""
    torch.manual_seed(rng.seed(config.seed, "init"))
    model = TransformerLM(model_config, config.gradient_checkpointing).to(device)
    scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")
    return TrainState(model, OPTIMIZERS[config.optimizer](model, config), scaler)


def get_batch(
    dataset: NDArray[Any],
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


def train(state: TrainState, split: Split, config: TrainConfig) -> Iterator[Record]:
    """Train up to config.max_steps, giving a record of each step after it.

    The caller may evaluate, save or stop between two records; nothing here notices. Raises
    Diverged before a step would use a loss or gradient norm that is not finite.
    """
    device = next(state.model.parameters()).device
    loss_of = compiled(_loss, device) if config.compile else _loss
    context_length = state.model.config.context_length
    while state.step < config.max_steps:
        start = time.perf_counter()
        state.model.train()
        x, y = get_batch(
            split.tokens,
            config.batch_size,
            context_length,
            device,
            seed=config.seed,
            step=state.step,
            sampling=config.sampling,
        )
        record = train_step(state, x, y, config, loss_of)
        yield record | {
            "tokens": state.step * config.batch_size * context_length,
            "step_s": time.perf_counter() - start,
        }


def train_step(
    state: TrainState,
    x: Int[Tensor, "B T"],
    y: Int[Tensor, "B T"],
    config: TrainConfig,
    loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor],
) -> Record:
    """One update: schedule, forward, loss, backward, clip, step."""
    fraction = learning_rate_fraction(state.step + 1, config)
    for group in state.optimizer.param_groups:
        group["lr"] = fraction * group["initial_lr"]
    loss, grad_norm = _backward(state, x, y, config, loss_of)
    while state.scaler.is_enabled() and math.isfinite(loss) and not math.isfinite(grad_norm):
        state.scaler.update()  # the scale was too large for float16: lower it, and again
        if state.scaler.get_scale() < 1:
            break
        loss, grad_norm = _backward(state, x, y, config, loss_of)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        name = "gradient norm" if math.isfinite(loss) else "loss"
        value = grad_norm if math.isfinite(loss) else loss
        raise Diverged(
            f"{name} is {value} at step {state.step + 1}; parameters untouched; "
            "lower train.lr, raise train.warmup_steps or set train.dtype: float32"
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


def _backward(
    state: TrainState,
    x: Tensor,
    y: Tensor,
    config: TrainConfig,
    loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor],
) -> tuple[float, float]:
    """Fill the clipped gradients of the whole batch; returns its loss in nats and their norm."""
    state.optimizer.zero_grad(set_to_none=True)
    micro_batches = list(
        zip(x.split(config.windows_at_once), y.split(config.windows_at_once), strict=True)
    )
    total = torch.zeros((), device=x.device)
    try:
        for number, (micro_x, micro_y) in enumerate(micro_batches):
            if state.model.config.dropout:
                torch.manual_seed(rng.seed(config.seed, "dropout", state.step, number))
            with autocast(x.device, config.dtype):
                loss = loss_of(state.model, micro_x, micro_y) / len(micro_batches)
            state.scaler.scale(loss).backward()
            total += loss.detach()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise EnvironmentFault(
            f"out of memory on {x.device} with {config.windows_at_once} windows at a time; try "
            f"train.micro_batch_size: {max(1, config.windows_at_once // 2)} "
            "or train.gradient_checkpointing: true"
        ) from None
    state.scaler.unscale_(state.optimizer)
    limit = math.inf if config.max_grad_norm is None else config.max_grad_norm
    grad_norm = gradient_clipping(state.model.parameters(), limit)
    return total.item(), grad_norm.item()


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x), y)
