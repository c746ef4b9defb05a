"""The playground and OpenAI's API as a Flask application: routes, answers and errors.

It refuses requests that name another host (DNS rebinding), and bodies that are not declared as
JSON, which pages of another origin could send.
"""

import json
import re
import secrets
import time
import traceback
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from flask import Flask, Response, request
from flask.json.provider import DefaultJSONProvider
from werkzeug.exceptions import BadRequest, HTTPException, RequestEntityTooLarge, RequestTimeout

from lm.base.errors import EnvironmentFault, InputError, is_out_of_memory
from lm.serve.completions import Part, Served, UnknownModel, Usage, merged
from lm.serve.request import PATH, read_prompts, read_request

HOST = "127.0.0.1"
HOST_NAMES = [HOST, "localhost"]  # by which programs on this machine call it
CONNECTION = "lm.connection"  # key of the WSGI environment: the connection of server.py
PAGE = Path(__file__).with_name("playground.html")
MAX_BODY_BYTES = 1 << 20
READ_SECONDS = 5  # from the first byte of a request to its last
Answer = dict[str, Any]


def application(served: Served) -> Flask:
    """Return the application. The WSGI server has to set CONNECTION."""
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
    def models() -> Answer:
        return {"object": "list", "data": [served.entry()]}

    @app.get("/v1/models/<path:name>")
    def model(name: str) -> Answer:
        served.require(name)
        return served.entry()

    @app.post(PATH)
    def completions() -> Response | Answer:
        asked = read_request(_json())  # a page of another origin cannot send JSON
        served.require(asked.model)
        prompts = read_prompts(asked, served.tokenizer, served.model.config.context_length)
        usage = Usage()
        head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
        }
        parts = served.answer(asked, prompts, usage, request.environ[CONNECTION].has_left)
        parts = chain([next(parts)], parts)  # a fault before the first part has its own status
        if not asked.stream:
            return head | {"choices": merged(parts), "usage": usage.total()}
        events = _events(head, parts, usage if asked.wants_usage else None)
        return Response(events, mimetype="text/event-stream", headers={"Cache-Control": "no-store"})

    app.register_error_handler(Exception, fault)
    return app


def _json() -> Any:
    connection = request.environ[CONNECTION]
    try:
        return request.get_json()
    except RequestEntityTooLarge:
        for _ in range(1024):  # a client that is still sending would miss the answer
            if not request.environ["wsgi.input"].read(1 << 16):
                break
        raise
    except (BadRequest, RecursionError, ValueError, OSError):  # the last two: of a chunked body
        if connection.is_late:
            raise RequestTimeout(f"the request did not arrive within {READ_SECONDS} s") from None
        raise InputError("the body is not valid JSON, or cut off, or nested too deeply") from None
    finally:
        connection.deadline.cancel()


def _events(head: Answer, parts: Iterator[Part], usage: Usage | None) -> Iterator[str]:
    """Yield server-sent events: the parts, the usage if wanted, and the end; or an error."""
    no_usage = {} if usage is None else {"usage": None}
    try:
        for part in parts:
            yield f"data: {json.dumps(head | {'choices': [part]} | no_usage)}\n\n"
        if usage is not None:
            yield f"data: {json.dumps(head | {'choices': [], 'usage': usage.total()})}\n\n"
        yield "data: [DONE]\n\n"
    except Exception as error:  # the status is already sent, so the error is an event
        yield f"data: {json.dumps(fault(error)[0])}\n\n"


def fault(error: Exception) -> tuple[Answer, int]:
    """Return an error in OpenAI's form and its HTTP status; log the traceback of a bug."""
    message, status = str(error), 500
    param: str | None = None
    code: str | None = None
    match error:
        case HTTPException(code=404):
            message, status, code = _not_found(request.path), 404, "unknown_url"
        case HTTPException():
            message, status = error.description or error.name, error.code or 500
        case UnknownModel():
            status, code = 404, "model_not_found"
        case InputError():
            found = re.search(r"request\.(\w+)", message)
            status, param = 400, found[1] if found else None
        case EnvironmentFault():
            status = 503
        case _ if is_out_of_memory(error):
            message, status = "out of memory; ask for fewer completions at once", 503
        case _:
            traceback.print_exception(error)
            message = "a bug in this server, which has logged a traceback"
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}, status


def _not_found(path: str) -> str:
    if path.endswith("/chat/completions"):
        return (
            f"there is no chat here: a base model continues a text; use {PATH} with a prompt "
            "instead of messages"
        )
    return f"{path}: no such page; here are /, {PATH} and /v1/models"
