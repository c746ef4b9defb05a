"""Measure the speed of a run, and find the process that the others wait for."""

import statistics
from collections import deque
from typing import Any

from lm.base.settings import TrainConfig
from lm.machine.device import describe
from lm.machine.gauges import (
    data_sheet_flops_per_second,
    matmul_flops_per_second,
    peak_memory_bytes,
)
from lm.train.state import Record, TrainState

WATCHED, SLOW = 20, 0.5  # last steps; a slow rank's forward pass takes longer by this share


class Pace:
    """The seconds of each step, and of its forward pass by rank."""

    def __init__(self) -> None:
        self.step_seconds: list[float] = []
        self.forward_seconds: deque[list[float]] = deque(maxlen=1000)  # of each step, by rank

    def add(self, record: Record, forward_seconds: list[float]) -> None:
        """Add a finished step."""
        self.step_seconds.append(record["step_s"])
        self.forward_seconds.append(forward_seconds)

    def slow_rank(self) -> str:
        """Return a remark on the rank that the others wait for, or "" if there is none."""
        latest = list(self.forward_seconds)[-WATCHED:]
        if len(latest) < WATCHED or len(latest[0]) == 1:
            return ""
        medians = [statistics.median(seconds) for seconds in zip(*latest, strict=True)]
        slowest = max(range(len(medians)), key=medians.__getitem__)
        others_s = statistics.median(medians[:slowest] + medians[slowest + 1 :])
        held_up_s = medians[slowest] - others_s
        if held_up_s < SLOW * max(others_s, statistics.median(self.step_seconds[-WATCHED:]) / 2):
            return ""
        times = medians[slowest] / others_s
        return f"  rank {slowest} is slow: {times:.1f} times the others' forward pass"

    def measured(self, state: TrainState, config: TrainConfig) -> dict[str, Any]:
        """Return speed and memory of a finished run, for metrics/performance.json.

        MFU is relative to the peak of all devices, by the data sheet or, if none is known, by a
        measured matrix product. Memory and the peaks are of one device. The forward seconds of a
        rank are its own work under ddp; under fsdp they include waiting for the others' weights,
        so they do not show a slow rank.
        """
        model, num_devices = state.model, state.processes.size
        device = model.head.device
        step_s = statistics.median(self.step_seconds) if self.step_seconds else float("nan")
        tokens_per_second = config.tokens_per_step(model.config) / step_s
        flops = model.flops_per_token()
        peak_bytes = peak_memory_bytes(device)  # before the products of matmul_flops_per_second
        rate = matmul_flops_per_second(device, config.dtype)
        promised = data_sheet_flops_per_second(device, config.dtype)
        mfu = tokens_per_second * flops / ((promised or rate) * num_devices)
        measured = {
            "device": describe(device),
            "num_devices": num_devices,
            "dtype": config.dtype,
            "tokens_per_second": round(tokens_per_second, 1),
            "step_seconds_median": round(step_s, 6),
            "peak_memory_bytes": peak_bytes,
            "flops_per_token": flops,
            "matmul_flops_per_second": round(rate),
            "data_sheet_flops_per_second": promised,
            "mfu_is_of": f"{'data_sheet' if promised else 'matmul'}_flops_per_second",
            "mfu": round(mfu, 4),
            "micro_batch_size": state.micro_batch_size,
            "compiled": config.compile,
        }
        if num_devices > 1:
            measured["forward_seconds_median_by_rank"] = [
                round(statistics.median(seconds), 6)
                for seconds in zip(*self.forward_seconds, strict=True)
            ]
        return measured
