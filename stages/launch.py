"""Start a stage in several processes on this machine, as torchrun does.

    python -m stages.train, runtime.num_processes: N -> launcher -> N x python -m stages.train

When a process fails, the launcher ends the others and exits with the code of the failure.
"""

import logging
import os
import signal
import sys
import tempfile
from uuid import uuid4

from lm.base.errors import EnvironmentFault


def launched() -> bool:
    """Return whether a launcher, ours or torchrun, has started this process."""
    return "RANK" in os.environ


def launch(module: str, num_processes: int, timeout_s: int) -> None:
    """Run `python -m module`, with this command line, in several processes until all succeed.

    Pass a signal on to them; they then have `timeout_s` seconds to finish a step and save.
    Raises SystemExit with the code of the process that failed first.
    """
    from torch.distributed.elastic.multiprocessing import (
        DefaultLogsSpecs,
        PContext,
        SignalException,
    )
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # the processes report their errors themselves
    # torch's timer may be deleted in its own thread, which then fails to join itself
    sys.unraisablehook = lambda _: None
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # use the loopback interface: the machine's name may not resolve
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    with tempfile.TemporaryDirectory() as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id=uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        if hasattr(config, "shutdown_timeout"):
            config.shutdown_timeout = timeout_s
        else:  # torch 2.11 has no setting for it
            PContext.close.__defaults__ = (None, timeout_s)
        try:
            elastic_launch(config, sys.executable)("-m", module, *sys.argv[1:])
        except SignalException as caught:
            raise SystemExit(128 + caught.sigval) from None
        except ChildFailedError as error:
            in_order = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
            raise leave_with({rank: failure.exitcode for rank, failure in in_order}) from None


def leave_with(codes: dict[int, int]) -> BaseException:
    """Return the error for exit codes by rank, the first failure first; a signal is < 0."""
    reported = [code for code in codes.values() if code > 0]
    if reported:  # a process that has lost another exits with `lost`: prefer the other's code
        lost = EnvironmentFault.exit_code
        return SystemExit(next((code for code in reported if code != lost), reported[0]))
    rank, code = next(iter(codes.items()))
    return EnvironmentFault(
        f"rank {rank} was ended by {signal.Signals(-code).name}; what was saved is intact: run "
        "again to go on"
    )
