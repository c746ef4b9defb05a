"""Prepare the process before torch is imported: lm/__init__.py imports this file first.

If a command is stopped or runs out of memory while torch is loaded, one line says so. A user id
without a name, as in a container, gets one: DVC and torch.compile name folders after it.
"""

import os
import pwd
import resource
import sys
from types import TracebackType

if sys.argv[:1] == ["-m"]:  # a command is starting: it may fail while torch is imported

    def _report(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
        if issubclass(kind, KeyboardInterrupt):
            sys.stderr.write("stopped\n")
        elif limited and (issubclass(kind, MemoryError) or "failed to map" in str(error)):
            sys.stderr.write("error: out of memory while torch is loaded; raise `ulimit -v`\n")
            os._exit(3)
        else:
            sys.__excepthook__(kind, error, traceback)

    sys.excepthook = _report

if not {"LOGNAME", "USER"} & os.environ.keys():
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        os.environ["LOGNAME"] = str(os.getuid())
        os.environ.setdefault("HOME", "/")
