"""What can go wrong outside this code, one class per exit code, told in one line.

A message says where, what was expected, what was found and what to do. Everything else
that is raised is a defect of ours and keeps its traceback.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """The user's parameters or data are at fault."""

    exit_code = 2


class EnvironmentFault(RuntimeError):
    """The machine cannot do what was asked: no such device, no compiler, no space."""

    exit_code = 3


class Diverged(ArithmeticError):
    """The loss or the gradient norm is not finite."""

    exit_code = 4


class Busy(RuntimeError):
    """Another process holds what this one needs."""

    exit_code = 75


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived and the work so far is safe."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signal_number


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn the errors above, OS errors and Ctrl-C into one line on stderr and an exit code."""
    try:
        yield
    except (InputError, EnvironmentFault, Diverged, Busy, Interrupted) as error:
        _leave(str(error), error.exit_code)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _leave(f"{where}{error.strerror or error}", EnvironmentFault.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _leave("out of memory; make the model or the batch smaller", EnvironmentFault.exit_code)
    except KeyboardInterrupt:
        _leave("interrupted", 128 + signal.SIGINT)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether NumPy, torch on a CPU or torch on a GPU ran out of memory."""
    texts = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


def _leave(message: str, code: int) -> None:
    # names come from strangers too: no line break or escape code of theirs reaches the terminal
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(code)
