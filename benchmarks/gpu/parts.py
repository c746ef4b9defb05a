"""The parts of the acceptance run, most important first.

python -m benchmarks.gpu.parts JOB: run one in a process of its own; print each figure as JSON.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu import equality, speed
from benchmarks.worker import begin


@dataclass(frozen=True)
class Part:
    """A part: what to run, and for how long."""

    run: Callable[[torch.device, bool, Callable[..., None]], None]  # device, tiny, note
    most_s: float  # then it is stopped
    needed_s: float  # with less time left it is not begun
    alone: bool = True  # on the machine; the others run side by side


PARTS = {
    "machine": Part(speed.machine, 40, 10),
    "equality": Part(equality.equality, 160, 40, alone=False),
    "curve": Part(equality.curve, 120, 30, alone=False),
    "124M": Part(speed.beside_nanogpt, 140, 60),
    "17M": Part(speed.stories, 100, 45),
    "preset": Part(speed.preset, 110, 50),
    "decode": Part(speed.decode, 50, 20),
    "124M, other ways": Part(speed.ways, 140, 60),
}


def main() -> None:
    """Run a part; report each figure, and last that all is done."""
    (name, device_name, tiny), tell = begin()

    def note(name: str, **figures: Any) -> None:
        tell(name=name, **figures)

    device = torch.device(device_name)
    PARTS[name].run(device, tiny, note)
    tell(done=True)


if __name__ == "__main__":
    main()
