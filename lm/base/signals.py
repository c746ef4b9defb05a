"""End in order: after the current step at a signal, and soon after the parent's death."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lm.base.errors import Interrupted

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# not SIGTERM: killing the whole group sends it too, and a second one ends without saving
_PARENT_DIED = signal.SIGUSR2
_REPEATED_S = 5
_ORPHAN_SECONDS = 4  # then an orphan ends, even within a step


class CatchSignals:
    """Within this context note the first SIGINT or SIGTERM; let a second one end the process.

    A launcher passes on signals that its processes may also have received, and torch's launcher
    sends them twice. So in a launched process repetitions within some seconds count as one. The
    parent's death counts as a SIGTERM, and ends the process some seconds later.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self._since, self._launched = 0.0, "TORCHELASTIC_RUN_ID" in os.environ
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> "CatchSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        signal.signal(_PARENT_DIED, self._note_orphan)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.caught is None:
            self.caught, self._since = number, now
        if not self._launched or now - self._since > _REPEATED_S:
            self._restore()
            if self._launched:
                signal.raise_signal(number)

    def _note_orphan(self, number: int, frame: FrameType | None) -> None:
        self.caught = self.caught or signal.SIGTERM
        signal.alarm(_ORPHAN_SECONDS)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *error: object) -> None:
        self._restore()
        signal.signal(_PARENT_DIED, signal.SIG_DFL)

    def leave(self, message: str) -> None:
        """Raise Interrupted if a signal was noted."""
        if self.caught is not None:
            raise Interrupted(self.caught, message)


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Within this context let SIGTERM raise Interrupted, as Ctrl-C raises KeyboardInterrupt."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number, "stopped")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_with_parent() -> None:
    """Ask Linux for a signal at the parent's death: a killed dvc must leave no training behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _PARENT_DIED)
        # a parent in another session: ours died before we asked, or is torchrun, which gives each
        # process a session of its own
        apart = os.getsid(os.getppid()) != os.getsid(0)
        if apart and os.getsid(0) != os.getpid():
            os.kill(os.getpid(), _PARENT_DIED)
