"""Launch steps on a GPU before the host has read the losses and norms of earlier ones.

A host that waits for them after each step leaves the GPU idle. Here the device decides by itself:
once a loss or norm is not finite, it sets `nonfinite`, and from then on updates leave parameters
and optimizer as they are. The host reads loss and norm some steps later. If one is not finite, the
state goes back to the step before, since nothing has changed. `train_step` then computes that step
as any other, to explain, skip or repeat it.
"""

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from lm.base.settings import TrainConfig
from lm.model.transformer import Ids
from lm.train.parallel import GradientAccumulator
from lm.train.state import Record, TrainState
from lm.train.step import clipped_norm, forward_backward, mean_loss

AHEAD = 3  # steps launched but not yet read, at most: with one the GPU would wait for the host
SLOW_S = 0.5  # longer steps are launched one by one: a wait is no loss, and a signal acts sooner


@dataclass
class _Launched:
    step: int
    micro_batch_size: int
    figures: Tensor  # losses of its micro-batches, gradient norm; on the host after `read`
    read: torch.cuda.Event | None  # None on a CPU, where they are there at once


class StepsAhead:
    """The steps that are launched and whose figures the host has not read yet."""

    def __init__(self, state: TrainState, config: TrainConfig, accumulator: GradientAccumulator):
        self.state, self.config, self.accumulator = state, config, accumulator
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
        losses = forward_backward(state, self.config, x, y, self.accumulator)
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
        """Wait for the oldest launched step and return its record.

        Return None if its loss or norm is not finite: the state is then the one before that step.
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
