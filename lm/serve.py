"""A playground and an OpenAI-compatible API for a model, on this machine: `python -m lm.serve`.

    browser, openai, curl -> cheroot's threads -> Flask -> lm.completions -> one answer, or events

Only programs of this machine are served: the socket is loopback's, a request by another host name
(a page that rebinds its own) is refused, and so is a body that a page of another origin can send.
"""

import argparse
import os
import secrets
import select
import socket
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from cheroot.wsgi import Gateway_10, Server
from flask import Flask, Response, request
from flask.json.provider import DefaultJSONProvider
from werkzeug.exceptions import BadRequest, HTTPException, RequestEntityTooLarge

from lm.checkpoint import load_model
from lm.completions import LOOK_SECONDS, PATH, Served, Usage, events, fault, merged, refusal
from lm.console import say
from lm.device import choose_device
from lm.errors import EnvironmentFault, InputError, one_line_errors
from lm.signals import CatchSignals

HOST = "127.0.0.1"
HOST_NAMES = [HOST, "localhost"]  # by which programs of this machine call it
SOCKET = "lm.socket"  # of the environment that WSGI hands to the application
PAGE = Path(__file__).with_name("playground.html")
MAX_BODY_BYTES = 1 << 20
THREADS = 16  # one generates; the others hold those who wait, and serve the page


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
        parts = served.choices(asked, prompts, usage, partial(has_left, request.environ[SOCKET]))
        if not asked.stream:
            return head | {"choices": merged(parts), "usage": usage.total()}
        told = events(head, parts, usage if asked.wants_usage else None)
        return Response(told, mimetype="text/event-stream", headers={"Cache-Control": "no-store"})

    @app.errorhandler(Exception)
    def refuse(error: Exception) -> tuple[dict[str, Any], int]:
        if isinstance(error, HTTPException):
            return refusal(error.code or 500, error.description or error.name)
        return fault(error)

    return app


def _json() -> Any:
    try:
        return request.get_json()
    except RequestEntityTooLarge:
        for _ in range(1024):  # a client that is still sending would not hear the answer
            if not request.environ["wsgi.input"].read(1 << 16):
                break
        raise
    except (BadRequest, RecursionError):
        raise InputError("the body is not valid JSON, or nested too deeply") from None


class _Gateway(Gateway_10):
    """Tells the application the socket, to look whether the client is still there."""

    def respond(self) -> None:
        self.env[SOCKET] = self.req.conn.socket
        super().respond()


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
    server = Server((HOST, port), application(served), numthreads=THREADS)
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


if __name__ == "__main__":
    main()
