"""Launch steps on a GPU before the host has read the figures of the last ones.

A host that waits for loss and norm after each step leaves the GPU idle meanwhile. Here the device
decides by itself: once a loss or norm is not finite, the latch `nonfinite` makes every update leave
parameters and optimizer as they are. The host reads the figures of a step some steps later. If they
are not finite, nothing has moved since: the state goes back to that step, which then runs as any
other does, so that it is explained, skipped or repeated.
"""

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from lm.base.settings import TrainConfig
from lm.model.transformer import Ids
from lm.train.parallel import BatchGradients
from lm.train.state import Record, TrainState
from lm.train.step import clipped_norm, forward_backward, mean_loss

AHEAD = 3  # steps that may be launched and not read: with one the GPU would wait for the host
SLOW_S = 0.5  # for longer steps that is nothing, and a signal should not wait for more of them


@dataclass
class _Launched:
    step: int
    micro_batch_size: int
    figures: Tensor  # losses of its micro-batches and gradient norm, on the host once `read`
    read: torch.cuda.Event | None  # None on a CPU, where nothing is late


class StepsAhead:
    """The steps that were launched and whose figures the host has not read."""

    def __init__(self, state: TrainState, config: TrainConfig, gradients: BatchGradients):
        self.state, self.config, self.gradients = state, config, gradients
        self.launched: deque[_Launched] = deque()
        self.step_s = 0.0  # of the last step
        self.nonfinite = torch.zeros((), dtype=torch.bool, device=state.model.head.device)

    @property
    def room(self) -> bool:
        """Whether another step may be launched."""
        most = 1 if self.step_s > SLOW_S else AHEAD
        return len(self.launched) < most and self.state.step < self.config.max_steps

    def launch(self, x: Ids, y: Ids) -> None:
        """Launch the next step and the copy of its figures to the host; wait for nothing."""
        state = self.state
        losses = forward_backward(state, self.config, x, y, self.gradients)
        figures = torch.cat([losses, clipped_norm(state, self.config)[None]])
        self.nonfinite |= ~figures.isfinite().all()
        state.optimizer.found_inf = self.nonfinite.float()
        state.optimizer.step()
        state.optimizer.found_inf = None
        state.step += 1
        on_host = figures.to("cpu", non_blocking=True)  # into pinned memory
        read = torch.cuda.Event() if figures.is_cuda else None
        if read is not None:
            read.record()
        self.launched.append(_Launched(state.step, state.micro_batch_size, on_host, read))

    def take(self) -> Record | None:
        """Wait for the oldest step and return its record.

        Return None if its loss or norm is not finite: the state is then the one before it.
        """
        oldest = self.launched.popleft()
        if oldest.read is not None:
            oldest.read.synchronize()
        loss, grad_norm = mean_loss(oldest.figures[:-1].numpy()), oldest.figures[-1].item()
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.state.skipped_in_a_row = 0
            record = {"step": oldest.step, "train_loss": loss, "grad_norm": grad_norm}
            return record | {"micro_batch_size": oldest.micro_batch_size}
        self.launched.clear()
        self.nonfinite.zero_()
        self.state.step = oldest.step - 1
        return None
