"""Leaving in order: after the step on a signal, and never later than the parent."""

import ctypes
import os
import signal
import sys
from types import FrameType, TracebackType

from lm.errors import Interrupted

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_ORPHAN_SECONDS = 4  # a step may take longer, and nobody waits for an orphan


class CatchSignals:
    """Within this context the first SIGINT or SIGTERM is noted, a second one ends the process."""

    def __init__(self) -> None:
        self.caught: int | None = None
        self._parent = os.getppid()
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> "CatchSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.caught = number
        self._restore()
        if os.getppid() != self._parent:
            signal.alarm(_ORPHAN_SECONDS)  # ends the process, saved or not

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def leave(self, message: str) -> None:
        """Raise Interrupted if a signal was noted."""
        if self.caught is not None:
            raise Interrupted(self.caught, message)


def end_with_parent() -> None:
    """Ask Linux for a SIGTERM when the parent dies: a killed dvc leaves no orphan training."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before we asked
            os.kill(os.getpid(), signal.SIGTERM)
