"""A playground and an OpenAI-compatible API for a model, on this machine: `python -m lm.serve`.

    browser, openai, curl -> cheroot's threads -> Flask -> completions.py -> one answer, or events

Only programs of this machine are served: the socket is loopback's, a request by another host name
(a page that rebinds its own) is refused, and so is a body that a page of another origin can send.
A thread serves a request, not a connection, and only for a while: what clients hold back, requests
half sent and answers not read, costs the others nothing.
"""

import argparse
import logging
import os
import resource
import secrets
import select
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread, Timer
from typing import Any

from cheroot.server import HTTPConnection
from cheroot.wsgi import Gateway_10, Server
from flask import Flask, Response, request
from flask.json.provider import DefaultJSONProvider
from werkzeug.exceptions import BadRequest, HTTPException, RequestEntityTooLarge

from lm.base.console import say
from lm.base.errors import EnvironmentFault, InputError, one_line_errors
from lm.base.signals import CatchSignals
from lm.machine.device import choose_device
from lm.model.model_folder import load_model
from lm.serve.completions import (
    LOOK_SECONDS,
    MAX_SEATS,
    PATH,
    Refused,
    Served,
    Usage,
    begun,
    events,
    fault,
    merged,
    refusal,
)

HOST = "127.0.0.1"
HOST_NAMES = [HOST, "localhost"]  # by which programs of this machine call it
CONNECTION = "lm.connection"  # of the environment that WSGI hands to the application
PAGE = Path(__file__).with_name("playground.html")
MAX_BODY_BYTES, MAX_HEADER_BYTES = 1 << 20, 1 << 16
THREADS = 2 * MAX_SEATS  # so that half of them read requests and serve the page
MAX_CONNECTIONS = 256  # that are idle, and as many with a request that waits for a thread
READ_SECONDS = 5  # from the first byte of a request to its last
SECONDS = 10  # an idle connection is closed; so is that of a client that does not read its answer


def application(served: Served) -> Flask:
    """The page and the API, to be run by any WSGI server that tells its socket."""
    app = Flask(__name__, static_folder=None)
    app.config.update(MAX_CONTENT_LENGTH=MAX_BODY_BYTES, TRUSTED_HOSTS=HOST_NAMES)
    app.json = in_order = DefaultJSONProvider(app)
    in_order.sort_keys = False  # the most probable first

    @app.get("/")
    def playground() -> Response:
        nonce = secrets.token_urlsafe(16)
        page = Response(PAGE.read_text(encoding="utf-8").replace("NONCE", nonce))
        page.headers["Content-Security-Policy"] = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
            "connect-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'"
        )
        return page

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [served.card()]}

    @app.get("/v1/models/<path:name>")
    def model(name: str) -> dict[str, Any]:
        served.require(name)
        return served.card()

    @app.post(PATH)
    def completions() -> Response | dict[str, Any]:
        asked, prompts = served.read(_json())  # a page of another origin cannot send JSON unasked
        usage, head = Usage(), served.head()
        connection = request.environ[CONNECTION].socket
        parts = begun(served.choices(asked, prompts, usage, partial(has_left, connection)))
        if not asked.stream:
            return head | {"choices": merged(parts), "usage": usage.total()}
        told = events(head, parts, usage if asked.wants_usage else None)
        return Response(told, mimetype="text/event-stream", headers={"Cache-Control": "no-store"})

    @app.errorhandler(Exception)
    def refuse(error: Exception) -> tuple[dict[str, Any], int]:
        if isinstance(error, HTTPException):
            if error.code == 404:
                return refusal(404, _absent(request.path), code="unknown_url")
            return refusal(error.code or 500, error.description or error.name)
        return fault(error)

    return app


def _json() -> Any:
    connection: _Connection = request.environ[CONNECTION]
    try:
        return request.get_json()
    except RequestEntityTooLarge:
        for _ in range(1024):  # a client that is still sending would not hear the answer
            if not request.environ["wsgi.input"].read(1 << 16):
                break
        raise
    except (BadRequest, RecursionError, ValueError, OSError):  # the last two: of chunks
        if connection.is_late:
            raise Refused(408, f"the request was not sent in {READ_SECONDS} s") from None
        raise InputError("the body is not valid JSON, cut off, or nested too deeply") from None
    finally:
        connection.deadline.cancel()


def _absent(path: str) -> str:
    if path.endswith("/chat/completions"):
        return (
            f"there is no chat here: base models write on from a text; use {PATH} with a prompt "
            "instead of messages"
        )
    return f"{path}: no such page; here are /, {PATH} and /v1/models"


class _Gateway(Gateway_10):
    """Tells the application the connection: until when it may be read, and whether it is left."""

    def respond(self) -> None:
        self.env[CONNECTION] = self.req.conn
        if self.req.chunked_read:
            self.req.rfile.maxlen = 2 * MAX_BODY_BYTES  # a chunk is memory before anyone looks
        super().respond()


class _Connection(HTTPConnection):
    """One that has to send its request in time: after that it is as if it had sent no more."""

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
        self.is_late = True
        with suppress(OSError):  # it is closed
            self.socket.shutdown(socket.SHUT_RD)


class _Server(Server):
    """cheroot's, in which connections without a request hold no thread, with a shorter log."""

    ConnectionClass = _Connection
    keep_alive_conn_limit = MAX_CONNECTIONS
    max_request_header_size = MAX_HEADER_BYTES

    def process_conn(self, conn: HTTPConnection) -> None:
        if conn.last_used is None and self.can_add_keepalive_connection:
            self.put_conn(conn)  # new: to a thread when something comes
        else:
            super().process_conn(conn)

    def error_log(self, msg: str = "", level: int = logging.INFO, traceback: bool = False) -> None:
        if level >= logging.WARNING:  # below it, clients leave
            line = " ".join(f"{msg} {sys.exc_info()[1] or ''}".split())
            sys.stderr.write(f"warning: {line}\n")


def has_left(connection: socket.socket) -> bool:
    """Whether the other side has closed the connection."""
    try:
        readable, _, _ = select.select([connection], [], [], 0)
        return bool(readable) and not connection.recv(1, socket.MSG_PEEK)
    except (OSError, ValueError):  # reset by it; closed by us
        return True


def serve(served: Served, port: int) -> None:
    """Answer requests until a signal comes. Raises Interrupted then, EnvironmentFault before."""
    try:
        socket.create_server((HOST, port)).close()  # cheroot's own error has more words
    except OSError as error:
        raise EnvironmentFault(
            f"{HOST}:{port}: {os.strerror(error.errno or 0)}; choose another by --port, 0 takes "
            "any free one"
        ) from None
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < 4 * MAX_CONNECTIONS:  # as on macOS, where 256 are usual
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4 * MAX_CONNECTIONS, most), most))
    server = _Server(
        (HOST, port),
        application(served),
        numthreads=THREADS,
        timeout=SECONDS,
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
                thread.join(LOOK_SECONDS)
        finally:
            served.stopping.set()
            server.stop()
            thread.join()
        signals.leave("stopped")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lm.serve", description="A playground and an OpenAI-compatible API."
    )
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument("--model", type=Path, default=Path("models/model"), help="its folder")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    options = parser.parse_args(arguments)
    with one_line_errors():
        if not 0 <= options.port < 1 << 16:
            raise InputError("--port: must be in [0, 65535]")
        model, tokenizer = load_model(options.model, choose_device(options.device))
        created = int((options.model / "config.json").stat().st_mtime)
        serve(Served(options.model.resolve().name, created, model, tokenizer), options.port)
