"""The HTTP server of `python -m lm.serve`, which answers even while other clients stall.

    browser, openai, curl -> cheroot's threads -> app.py -> completions.py -> one answer, or events

It listens on the loopback address, so it serves only programs on this machine. A thread serves a
request, not a connection. Requests that arrive too slowly are cut off, and answers that nobody
reads.
"""

import argparse
import logging
import os
import resource
import select
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread, Timer

from cheroot.server import HTTPConnection
from cheroot.wsgi import Gateway_10, Server

from lm.base.console import say
from lm.base.errors import EnvironmentFault, InputError, one_line_errors
from lm.base.paths import MODEL
from lm.base.sections import brief
from lm.base.settings import DEVICE
from lm.base.signals import CatchSignals
from lm.machine.device import choose_device
from lm.model.model_folder import load_model
from lm.serve.app import CONNECTION, HOST, MAX_BODY_BYTES, READ_SECONDS, application
from lm.serve.completions import MAX_SEATS, POLL_SECONDS, Served

MAX_HEADER_BYTES = 1 << 16
THREADS = 2 * MAX_SEATS  # at least half of them can read requests and serve the page
MAX_CONNECTIONS = 256  # that are idle; as many more may wait for a thread
IDLE_SECONDS = 10  # after which an idle connection, or one whose client does not read, is closed


class _Connection(HTTPConnection):
    """A connection that must send each request within READ_SECONDS."""

    is_late = False

    def communicate(self) -> bool:
        self.deadline = Timer(READ_SECONDS, self._end_reading)
        self.deadline.daemon = True
        self.deadline.start()
        try:
            return bool(super().communicate())
        finally:
            self.deadline.cancel()

    def _end_reading(self) -> None:
        """Close the receiving side, so that reading the request ends."""
        self.is_late = True
        with suppress(OSError):  # already closed
            self.socket.shutdown(socket.SHUT_RD)

    def has_left(self) -> bool:
        """Return whether the client has closed the connection."""
        try:
            readable, _, _ = select.select([self.socket], [], [], 0)
            return bool(readable) and not self.socket.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):  # reset by the client; closed by us
            return True


class _Gateway(Gateway_10):
    """Pass the connection of a request to the application."""

    def respond(self) -> None:
        self.env[CONNECTION] = self.req.conn
        if self.req.chunked_read:
            self.req.rfile.maxlen = 2 * MAX_BODY_BYTES  # a chunk is read whole before it is checked
        super().respond()


class _Server(Server):
    """cheroot's server with a short log; a connection without a request takes no thread."""

    ConnectionClass = _Connection
    keep_alive_conn_limit = MAX_CONNECTIONS
    max_request_header_size = MAX_HEADER_BYTES

    def process_conn(self, conn: HTTPConnection) -> None:
        if conn.last_used is None and self.can_add_keepalive_connection:
            self.put_conn(conn)  # new: it gets a thread when its first byte arrives
        else:
            super().process_conn(conn)

    def error_log(self, msg: str = "", level: int = logging.INFO, traceback: bool = False) -> None:
        if level >= logging.WARNING:  # lower levels report that clients left
            line = " ".join(f"{msg} {sys.exc_info()[1] or ''}".split())
            sys.stderr.write(f"warning: {line}\n")


def serve(served: Served, port: int) -> None:
    """Answer requests until a signal arrives, then raise Interrupted.

    Raises EnvironmentFault if the port is taken.
    """
    try:
        socket.create_server((HOST, port)).close()  # cheroot's own error has more words
    except OSError as error:
        raise EnvironmentFault(
            f"{HOST}:{port}: {os.strerror(error.errno or 0)}; choose another with --port; 0 takes "
            "any free one"
        ) from None
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < 4 * MAX_CONNECTIONS:  # as on macOS, where 256 are usual
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4 * MAX_CONNECTIONS, most), most))
    server = _Server(
        (HOST, port),
        application(served),
        numthreads=THREADS,
        timeout=IDLE_SECONDS,
        request_queue_size=MAX_CONNECTIONS,
        accepted_queue_size=MAX_CONNECTIONS,
        accepted_queue_timeout=0,  # beyond: 503
    )
    server.gateway = _Gateway
    with CatchSignals() as signals:
        server.prepare()
        thread = Thread(target=server.serve)
        thread.start()
        try:
            say(f"http://{HOST}:{server.bind_addr[1]}/ serves {served.name}; Ctrl-C ends it")
            while thread.is_alive() and signals.caught is None:
                thread.join(POLL_SECONDS)
        finally:
            served.stopping.set()
            server.stop()
            thread.join()
        signals.leave("stopped")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lm.serve", description="A playground and an OpenAI-compatible API."
    )
    parser.add_argument("--port", type=int, default=8000, help="0: take any free one")
    parser.add_argument("--model", type=Path, default=MODEL, help="model folder")
    parser.add_argument("--device", default="auto", help=DEVICE.text)
    options = parser.parse_args(arguments)
    with one_line_errors():
        if not 0 <= options.port < 1 << 16:
            raise InputError(f"--port {options.port}: must be in [0, 65535]")
        if not DEVICE.holds(options.device):
            raise InputError(f"--device {brief(options.device)}: {DEVICE.text}")
        model, tokenizer = load_model(options.model, choose_device(options.device))
        created = int((options.model / "config.json").stat().st_mtime)
        serve(Served(options.model.resolve().name, created, model, tokenizer), options.port)
