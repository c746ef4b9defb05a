"""Work shared out: in order, and nobody goes on when there is nobody to work for."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import psutil
import pytest

from lm.base.errors import EnvironmentFault, InputError
from lm.prepare.workers import number_of_workers, ordered_map
from tests.kill import gone
from tests.project import ROOT

# of Python 3.12; the threads of this process are those of the test runner
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


def square_late(number):
    """The first ones last."""
    time.sleep(0.05 * max(0, 3 - number))
    return number**2, os.getpid()


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_results_come_in_the_order_of_the_items(num_workers):
    results = list(ordered_map(square_late, range(9), num_workers))
    assert [result for result, _ in results] == [number**2 for number in range(9)]
    pids = {pid for _, pid in results}
    assert (pids == {os.getpid()}) is (num_workers == 1)


def test_one_worker_takes_an_item_when_its_result_is_wanted():
    taken = []
    results = ordered_map(taken.append, range(5), 1)
    next(results)
    assert taken == [0]
    results.close()


def fail_at_3(number):
    if number == 3:
        raise InputError("3 is bad")
    return number


@pytest.mark.parametrize("num_workers", [1, 3])
def test_an_error_comes_after_the_results_before_it(num_workers):
    found = []
    with pytest.raises(InputError, match="3 is bad"):
        found.extend(ordered_map(fail_at_3, range(100), num_workers))
    assert found == [0, 1, 2]
    assert not multiprocessing.active_children()


def die_at_2(number):
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_worker_is_a_fault_of_the_environment():
    with pytest.raises(EnvironmentFault, match="a worker process was killed.*runtime.num_workers"):
        list(ordered_map(die_at_2, range(5), 2))


def test_closed_it_ends_the_work_at_once():
    before = time.monotonic()
    with closing(ordered_map(time.sleep, [0, 300, 300, 300], 2)) as results:
        next(results)
    assert time.monotonic() - before < 200
    assert not multiprocessing.active_children()


def test_the_signal_of_before_is_restored():
    before = signal.getsignal(signal.SIGTERM)
    list(ordered_map(abs, [1], 1))
    list(ordered_map(abs, [1], 2))
    assert signal.getsignal(signal.SIGTERM) is before


def test_there_are_as_many_workers_as_wanted_or_as_cores():
    assert number_of_workers(7) == 7
    assert 1 <= number_of_workers(None) <= os.cpu_count()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cannot confine a process here")
def test_a_process_confined_to_one_core_has_one_worker():
    program = (
        "import os; from lm.prepare.workers import number_of_workers\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "print(number_of_workers(None), number_of_workers(3))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "1 3\n"


SLEEPERS = """
import os, sys, time
from lm.base.errors import one_line_errors
from lm.prepare.workers import ordered_map

def sleep(number):
    os.write(1, f"{os.getpid()}\\n".encode())
    time.sleep(300)

with one_line_errors():
    list(ordered_map(sleep, range(9), int(sys.argv[1])))
"""


@pytest.mark.parametrize("everyone", [False, True], ids=["parent", "group"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_one_line_and_no_worker(number, everyone):
    """To the parent alone as `kill` sends it, or to the group as a terminal does."""
    if number == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("a parent's death is told by Linux alone")
    command = [sys.executable, "-c", SLEEPERS, "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes) as process:
        workers = [psutil.Process(int(process.stdout.readline())) for _ in range(2)]
        (os.killpg if everyone else os.kill)(process.pid, number)
        _, error = process.communicate(timeout=200)
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert (process.returncode, error) == (128 + number, "stopped\n")
    assert gone(workers)
