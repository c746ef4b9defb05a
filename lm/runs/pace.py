"""How fast a run is, and which of its processes holds the others up."""

import statistics
from collections import deque
from typing import Any

from lm.base.settings import TrainConfig
from lm.machine.gauges import performance
from lm.train.state import Record, TrainState

WATCHED, SLOW = 20, 0.5  # steps; a rank is slow if its forward pass takes so much longer


class Pace:
    """The seconds of the steps, and those of the forward passes by rank."""

    def __init__(self) -> None:
        self.step_seconds: list[float] = []
        self.forward_seconds: deque[list[float]] = deque(maxlen=1000)  # of each step, by rank

    def add(self, record: Record, forward_seconds: list[float]) -> None:
        """Add a finished step."""
        self.step_seconds.append(record["step_s"])
        self.forward_seconds.append(forward_seconds)

    def slow_rank(self) -> str:
        """Name the rank that holds the others up; return nothing if none does."""
        latest = list(self.forward_seconds)[-WATCHED:]
        if len(latest) < WATCHED or len(latest[0]) == 1:
            return ""
        medians = [statistics.median(of_rank) for of_rank in zip(*latest, strict=True)]
        slowest = max(range(len(medians)), key=medians.__getitem__)
        others_s = statistics.median(medians[:slowest] + medians[slowest + 1 :])
        held_up_s = medians[slowest] - others_s
        if held_up_s < SLOW * max(others_s, statistics.median(self.step_seconds[-WATCHED:]) / 2):
            return ""
        times = medians[slowest] / others_s
        return f"  rank {slowest} is slow: {times:.1f} times the others' forward pass"

    def measured(self, state: TrainState, config: TrainConfig) -> dict[str, Any]:
        """Return speed and memory, for metrics/performance.json."""
        model, size = state.model, state.processes.size
        tokens, flops = config.batch_size * model.config.context_length, model.flops_per_token()
        device, seconds = model.head.device, self.step_seconds
        speed = performance(device, config.dtype, seconds, tokens, flops, size)
        if size > 1:
            by_rank = zip(*self.forward_seconds, strict=True)
            speed["forward_seconds_median_by_rank"] = [
                round(statistics.median(seconds), 6) for seconds in by_rank
            ]
        chosen = {
            "micro_batch_size": state.micro_batch_size,
            "compiled": config.compile is True,
        }
        return speed | chosen
