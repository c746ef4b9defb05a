"""Run a program in a fork of a warmed process (tests/warm.py); as usual if there is none for it."""

import json
import os
import signal
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.warm import OURS, address, ask

name, *arguments = sys.argv[1:]
real = sys.executable if name == "python" else str(Path(sys.executable).with_name("dvc"))
if name == "python" and arguments[:1] == ["-m"]:
    name, *arguments = arguments[1:]
connection = socket.socket(socket.AF_UNIX)
try:
    if name.partition(".")[0] not in ("dvc", *OURS) or os.environ.get("OMP_NUM_THREADS") != "1":
        raise FileNotFoundError  # torch has read the number of threads when it was imported
    connection.connect(address(name))
except (FileNotFoundError, ConnectionRefusedError):
    os.execv(real, [real, *sys.argv[2:]])
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: connection.send(bytes([number])))
case = {"folder": str(Path.cwd()), "program": name, "arguments": arguments}
ask(connection, case | {"environment": dict(os.environ)}, [0, 1, 2])
answer = connection.recv(1 << 16)
status = json.loads(answer)["status"] if answer else 70
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
