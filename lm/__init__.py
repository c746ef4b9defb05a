"""The language-model library: what the stages are made of, a folder for each job.

docs/ARCHITECTURE.md is the map. Begin with lm/model/transformer.py and lm/train/step.py.
"""

import os
import pwd
import resource
import sys
from types import TracebackType

if sys.argv[:1] == ["-m"]:  # a command is starting; what can happen while torch is imported

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

if not {"LOGNAME", "USER"} & os.environ.keys():  # DVC and torch.compile name folders after the user
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:  # a number without a name, as in a container
        os.environ["LOGNAME"] = str(os.getuid())
        os.environ.setdefault("HOME", "/")
