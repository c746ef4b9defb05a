"""The state of a training: model, optimizer, step, and for float16 the loss scaler."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lm.base import rng
from lm.base.settings import DTYPES, PARALLEL, TrainConfig
from lm.machine.device import compiled
from lm.machine.processes import ALONE, Processes
from lm.model.transformer import ModelConfig, TransformerLM
from lm.train.optim import OPTIMIZERS, AdamW
from lm.train.parallel import shard

Record = dict[str, Any]


@dataclass
class TrainState:
    """Everything that a step changes."""

    model: TransformerLM
    optimizer: AdamW
    scaler: torch.amp.GradScaler  # does nothing for a dtype that needs none
    micro_batch_size: int  # windows per backward pass; fewer after running out of memory
    processes: Processes = ALONE  # training this model together
    runs_ahead: bool = False  # steps may be launched before earlier ones are read: ahead.py
    step: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0


def new_state(
    model_config: ModelConfig,
    config: TrainConfig,
    device: torch.device,
    processes: Processes = ALONE,
    initialise: Callable[[TransformerLM], None] | None = None,
) -> TrainState:
    """Return the state before the first step, a function of settings and seed.

    `initialise` may give the model other weights, before they are shared out to processes.
    """
    torch.manual_seed(rng.seed(config.seed, "init"))
    model = TransformerLM(model_config, config.gradient_checkpointing)
    if initialise is not None:
        initialise(model)
    mode = PARALLEL[config.parallel]
    if config.compile and mode.several:
        for layer in model.layers:  # one compilation serves them all
            layer.forward = compiled(layer.forward, device)
    if mode.sharded:
        shard(model, device)  # moves block by block to the device
    else:
        model.to(device)
    scaled = DTYPES[config.dtype].scaled
    scaler = torch.amp.GradScaler(device.type, enabled=scaled)
    optimizer = OPTIMIZERS[config.optimizer].make(model, config)
    micro_batch_size = config.micro_batch_size or config.batch_size // processes.size
    # after an overflow the scale is lowered: with scaling the host must read each step
    runs_ahead = device.type == "cuda" and not (mode.several or scaled)
    return TrainState(model, optimizer, scaler, micro_batch_size, processes, runs_ahead)
