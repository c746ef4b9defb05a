"""Name the cause of a loss or gradient norm that is not finite."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lm.base.console import few
from lm.base.errors import Diverged
from lm.machine.sharded_tensors import local
from lm.train.parallel import GradientAccumulator
from lm.train.state import TrainState


def diagnose_nonfinite(
    state: TrainState,
    losses: NDArray[np.float32],
    loss: float,
    grad_norm: float,
    accumulator: GradientAccumulator,
    forward_backward: Callable[[], object],
) -> Diverged:
    """Compute the gradients again, since clipping has changed them; return an error with the cause.

    `losses` (N, n) are of the n micro-batches of each of the N processes.
    """
    state.scaler.update()
    accumulator.watching, accumulator.nonfinite = True, False
    forward_backward()
    accumulator.watching = False
    state.scaler.update()
    name, value = ("gradient norm", grad_norm) if math.isfinite(loss) else ("loss", loss)
    return Diverged(
        f"{name} is {value} at step {state.step + 1}{_first_ranks(state, losses, accumulator)}; "
        f"{_nonfinite_gradients(state)}"
    )


def _first_ranks(
    state: TrainState, losses: NDArray[np.float32], accumulator: GradientAccumulator
) -> str:
    """Name the ranks, if there are several, whose own losses or gradients were not finite."""
    if state.processes.size == 1:
        return ""
    nonfinite = np.array(state.processes.gather(accumulator.nonfinite))
    ranks = np.flatnonzero(nonfinite | ~np.isfinite(losses).all(axis=1))
    return f", first on rank {', '.join(map(str, ranks))}" if len(ranks) else ""


def _nonfinite_gradients(state: TrainState) -> str:
    """Name the parameters whose gradients are not finite."""
    groups = {
        id(p): f"{i} (weight decay {group['weight_decay']})"
        for i, group in enumerate(state.optimizer.param_groups)
        for p in group["params"]
    }
    found: dict[str, str] = {}
    for theirs in state.processes.gather(
        {
            name: groups[id(p)]
            for name, p in state.model.named_parameters()
            if p.grad is not None and not local(p.grad).isfinite().all()
        }
    ):
        found |= theirs
    if not found:
        return "every single gradient is finite"
    where = f"in parameter group {', '.join(sorted(set(found.values())))}"
    return f"gradients not finite {where}: {few(list(found))}"
