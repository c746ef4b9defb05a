"""Leaving in order: after the step on a signal, and never later than the parent."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from lm.base.errors import Interrupted

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# not SIGTERM: a kill of the whole group sends that as well, and a second one ends without saving
_PARENT_DIED = signal.SIGUSR2
_REPEATED_S = 5
_ORPHAN_SECONDS = 4  # a step may take longer, and nobody waits for an orphan


class CatchSignals:
    """Within this context the first SIGINT or SIGTERM is noted, a second one ends the process.

    A launcher hands on what its processes may have got themselves, and torch's sends it twice: of
    a launched process repetitions within some seconds are one signal. The parent's death is noted
    as a SIGTERM, and ends the process some seconds later.
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()
        signal.signal(_PARENT_DIED, signal.SIG_DFL)

    def leave(self, message: str) -> None:
        """Raise Interrupted if a signal was noted."""
        if self.caught is not None:
            raise Interrupted(self.caught, message)


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Within this context SIGTERM raises Interrupted, as Ctrl-C raises KeyboardInterrupt."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number, "stopped")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_with_parent() -> None:
    """Ask Linux for a signal when the parent dies: a killed dvc leaves no orphan training."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _PARENT_DIED)
        # had it died before we asked, init had adopted us; torchrun gives each a session of its own
        apart = os.getsid(os.getppid()) != os.getsid(0)
        if apart and os.getsid(0) != os.getpid():
            os.kill(os.getpid(), _PARENT_DIED)
