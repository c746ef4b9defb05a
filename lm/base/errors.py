"""The errors that users and machines cause: a class for each exit code, printed as one line.

A message says where, what was expected, what was found and what to do. Any other exception is
a bug of this project and keeps its traceback.
"""

import errno
import io
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

OUT_OF_MEMORY = "error: out of memory; make the model or the batch smaller"


class InputError(ValueError):
    """The user's settings or data are wrong."""

    exit_code = 2


class EnvironmentFault(RuntimeError):
    """The machine cannot do what was asked: no such device, no compiler, no space."""

    exit_code = 3


class Diverged(ArithmeticError):
    """The loss or the gradient norm is not finite."""

    exit_code = 4


class Busy(RuntimeError):
    """Another process is using what this one needs."""

    exit_code = 75


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived, and the work so far is saved."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signal_number


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn these errors, a missing package and Ctrl-C into one line on stderr and an exit code."""
    _open_streams()
    try:
        yield
    except (InputError, EnvironmentFault, Diverged, Busy) as error:
        _leave(f"error: {error}", error.exit_code)
    except Interrupted as stop:
        _leave(str(stop), stop.exit_code)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except ModuleNotFoundError as error:
        name = (error.name or "lm").partition(".")[0]
        if name in ("lm", "stages", "tools", "benchmarks"):
            raise
        missing = f"the Python package {name} is missing; run `make setup`, or pip install it"
        _leave(f"error: {missing}", EnvironmentFault.exit_code)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        line = f"error: {where}{error.strerror or error}"
        _leave(OUT_OF_MEMORY if is_out_of_memory(error) else line, EnvironmentFault.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _leave(OUT_OF_MEMORY, EnvironmentFault.exit_code)
    except KeyboardInterrupt:
        _leave("stopped", 128 + signal.SIGINT)


def _open_streams() -> None:
    """Open closed standard streams on /dev/null; escape what stdout cannot encode.

    Otherwise the next file to be opened would get the free descriptor, and the stream's output.
    """
    while (free := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(free, True)
    os.close(free)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115 - for good
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as Python has it for stderr


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: in NumPy, in torch, in a mapping or for a new thread."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    texts = r"out of memory|allocate memory|not enough memory|bad_alloc|can't start new thread"
    return isinstance(error, MemoryError) or re.search(texts, str(error)) is not None


def _leave(message: str, code: int) -> None:
    # it may quote untrusted text: escape line breaks and terminal codes
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    print(line, file=sys.stderr, flush=True)
    sys.exit(code)
