"""What to say of a step whose loss or gradients are not finite."""

import numpy as np
from numpy.typing import NDArray

from lm.base.settings import TrainConfig as TrainConfig
from lm.machine.sharded_tensors import local
from lm.train.parallel import Backward
from lm.train.state import TrainState


def _origin(state: TrainState, losses: NDArray[np.float32], backward: Backward) -> str:
    """On which of several processes something is not finite, in words."""
    if state.processes.size == 1:
        return ""
    spoilt = [not np.isfinite(row).all() for row in losses]
    gathered = state.processes.gather(backward.spoilt)
    ranks = [str(r) for r, both in enumerate(zip(spoilt, gathered, strict=True)) if any(both)]
    return f", first on rank {', '.join(ranks)}" if ranks else ""


def _nonfinite(state: TrainState) -> str:
    """Which parameters have gradients that are not finite, in words."""
    groups = {
        id(p): f"{i} (weight decay {group['weight_decay']})"
        for i, group in enumerate(state.optimizer.param_groups)
        for p in group["params"]
    }
    found: dict[str, str] = {
        name: groups[id(p)]
        for name, p in state.model.named_parameters()
        if p.grad is not None and not local(p.grad).isfinite().all()
    }
    if state.processes.size > 1:
        for theirs in state.processes.gather(found):
            found |= theirs
    if not found:
        return "every single gradient is finite"
    where = f"in parameter group {', '.join(sorted(set(found.values())))}"
    names = ", ".join(list(found)[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    return f"gradients not finite {where}: {names}"
