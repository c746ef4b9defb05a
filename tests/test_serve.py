"""The server, by the clients it is for: openai's own, a browser, and some it must refuse."""

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from math import log
from threading import Thread
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import openai
import psutil
import pytest
import torch
from playwright.sync_api import sync_playwright

from lm.base.errors import EnvironmentFault
from lm.base.params import load_params
from lm.base.sections import read_section
from lm.base.settings import DEVICE
from lm.data.tokenizer import byte_tokenizer
from lm.model.model_folder import save_model
from lm.model.transformer import ModelConfig, TransformerLM
from lm.serve.app import READ_SECONDS, fault
from lm.serve.completions import Served, Usage
from lm.serve.request import read_prompts, read_request
from lm.serve.server import main
from tests.browser import BROWSER
from tests.project import ROOT, SMOKE
from tests.servers import HOST

MARKUP = "<b id=x>"  # after each character comes the next one, and after the last the first
LIKELY, SECOND, OTHER = log(0.6), log(0.3), log(0.1 / 254)
END = "<|endoftext|>"
ENDLESS = {"model": "model", "prompt": "<", "temperature": 0, "max_tokens": 65536}


def markup_model(config):
    """Writes MARKUP for ever: the next character with 0.6, the one after it with 0.3.

    The rest is shared by the other 254 bytes. After "." comes the end token with 0.6. Its blocks
    begin as the identity, so a logit is a product of one embedding and one row of the head.
    """
    model = TransformerLM(config)
    circle = [*MARKUP.encode()]
    follows = {now: (circle[(k + 1) % 8], circle[(k + 2) % 8]) for k, now in enumerate(circle)}
    follows[ord(".")] = (255, ord("<"))
    with torch.no_grad():
        model.token_embeddings.weight.zero_()
        model.lm_head.weight.zero_()
        for feature, (now, (first, second)) in enumerate(follows.items()):
            model.token_embeddings.weight[now, feature] = 100  # normed: sqrt(d_model)
            for byte, share in ((first, 0.6), (second, 0.3)):
                logit = log(share) - OTHER
                model.lm_head.weight[byte, feature] = logit / config.d_model**0.5
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    settings = {"vocab_size": 256, "context_length": 16, "zero_init": True}
    settings = load_params(SMOKE)["model"] | settings
    folder = tmp_path_factory.mktemp("serve") / "model"
    model = markup_model(read_section(ModelConfig, {"model": settings}, "model"))
    save_model(model, byte_tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    """A server in a process of its own: its id and its URL. It must leave well, and say so."""
    command = [
        sys.executable,
        "-m",
        "lm.serve",
        "--port",
        "0",
        "--device",
        "cpu",
        "--model",
        folder,
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True) as process:
        url = process.stdout.readline().split()[0]
        yield process.pid, url
        process.terminate()
        _, said = process.communicate(timeout=300)
    assert (process.returncode, said) == (128 + signal.SIGTERM, "stopped\n")


@pytest.fixture
def client(server):
    with openai.OpenAI(
        base_url=f"{server[1]}v1", api_key="none", timeout=100, max_retries=0
    ) as client:
        yield client


@pytest.fixture
def complete(client):
    """A greedy completion by the real client, unless told otherwise."""

    def ask(prompt, **options):
        options = {"model": "model", "temperature": 0} | options
        return client.completions.create(prompt=prompt, **options)

    return ask


def is_open(port):
    with socket.socket() as client:
        return client.connect_ex((HOST, port)) == 0


def post(server, body, **headers):
    """Status and answer to a request that no client of ours would send."""
    headers = {"Content-Type": "application/json"} | headers
    request = Request(f"{server[1]}v1/completions", body, headers)
    try:
        with urlopen(request, timeout=100) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_text_counts_and_probabilities_are_those_worked_out_by_hand(complete):
    answer = complete("<", max_tokens=4, logprobs=2)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == ("b id", "length")
    assert answer.usage.model_dump(include={"prompt_tokens", "completion_tokens"}) == {
        "prompt_tokens": 1,
        "completion_tokens": 4,
    }
    assert choice.logprobs.tokens == ["b", " ", "i", "d"]
    assert choice.logprobs.token_logprobs == pytest.approx([LIKELY] * 4, abs=1e-4)
    assert choice.logprobs.text_offset == [1, 2, 3, 4]
    assert choice.logprobs.top_logprobs[0] == pytest.approx({"b": LIKELY, " ": SECOND}, abs=1e-4)
    ended = complete("x.", logprobs=0).choices[0]
    assert (ended.text, ended.finish_reason, ended.logprobs.tokens) == ("", "stop", [END])
    assert ended.logprobs.top_logprobs == [pytest.approx({END: LIKELY}, abs=1e-4)]


def test_a_stream_is_the_answer_in_pieces_with_the_usage_at_its_end(complete):
    options = {"max_tokens": 30, "logprobs": 1, "n": 2, "seed": 5, "temperature": 1}
    whole = complete("<b", **options)
    *parts, last = complete("<b", **options, stream=True, stream_options={"include_usage": True})
    assert len(parts) > 20
    assert (last.choices, last.usage) == ([], whole.usage)
    for choice in whole.choices:
        own = [p.choices[0] for p in parts if p.choices[0].index == choice.index]
        assert "".join(part.text for part in own) == choice.text
        assert [t for part in own for t in part.logprobs.tokens] == choice.logprobs.tokens
        ends = [part.finish_reason for part in own]
        assert ends == [None] * (len(own) - 1) + [choice.finish_reason]
    assert whole.choices[0].text != whole.choices[1].text
    assert len({part.id for part in parts}) == 1


def test_prompts_are_texts_or_ids_one_or_several(complete):
    def texts(prompt, **options):
        return [choice.text for choice in complete(prompt, max_tokens=3, **options).choices]

    assert texts("=") == texts([ord("=")]) == ["x><"]
    assert texts(["=", "b"]) == texts([[ord("=")], [ord("b")]]) == ["x><", " id"]
    assert texts(["=", "b"], n=2) == ["x><", "x><", " id", " id"]
    assert texts(MARKUP * 20) == ["<b "]  # longer than the context
    assert len(texts("")) == 1


def test_the_documented_code_runs(server, capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "SERVE.md").read_text(), re.S)
    names = {}
    exec(snippet.replace("http://127.0.0.1:8000/", server[1]), names)
    names["client"].close()
    whole, streamed = capsys.readouterr().out.split(" 20\n")
    assert len(streamed) > 0
    assert whole.startswith(streamed)


def test_a_stop_text_is_not_shown(complete):
    for options in ({"stop": "=x"}, {"stop": ["zz", "=x"]}):
        (choice,) = complete("<b", **options).choices
        assert (choice.text, choice.finish_reason) == (" id", "stop")
        streamed = list(complete("<b", **options, stream=True))
        assert "".join(part.choices[0].text for part in streamed) == " id"


def test_a_seed_gives_the_same_text_again(complete):
    def text(**options):
        return complete("<", **({"temperature": 1, "max_tokens": 40} | options)).choices[0].text

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text() != text()  # without one, a new one each time
    assert text(extra_body={"top_k": 1}) == text(top_p=0.5) == text(temperature=0)


def test_echo_scores_a_prompt(complete):
    (choice,) = complete("<b i.", echo=True, max_tokens=0, logprobs=1).choices
    assert (choice.text, choice.finish_reason) == ("<b i.", "length")
    assert choice.logprobs.tokens == ["<", "b", " ", "i", "."]
    first, *others = choice.logprobs.token_logprobs
    assert first is None
    assert others == pytest.approx([LIKELY, LIKELY, LIKELY, OTHER], abs=1e-4)
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 4]
    assert choice.logprobs.top_logprobs[4] == pytest.approx({"d": LIKELY, ".": OTHER}, abs=1e-4)
    (choice,) = complete("<", echo=True, max_tokens=2, logprobs=0).choices
    assert (choice.text, choice.logprobs.tokens) == ("<b ", ["<", "b", " "])


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_p": 0}, "top_p"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"prompt": ["a", "b"], "n": 65}, "n"),
        ({"prompt": ["a"] * 128 + [[-1]]}, "n"),  # counted before any is read
        ({"logprobs": 21}, "logprobs"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"seed": 1 << 63}, "seed"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [256]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": "a" * 17, "echo": True, "logprobs": 0}, "echo"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"logit_bias": {"50": 1}}, "logit_bias"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"extra_body": {"tempurature": 1}}, "tempurature"),
    ],
)
def test_a_bad_value_is_named(complete, options, param):
    with pytest.raises(openai.BadRequestError, match=f"request\\.{param}") as refused:
        complete(**({"prompt": "<"} | options))
    assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")


def test_neutral_values_of_what_is_not_supported_are_accepted(complete):
    neutral = {"best_of": 1, "suffix": None, "presence_penalty": 0, "logit_bias": {}, "user": "ann"}
    assert complete("<", **neutral, max_tokens=1).choices[0].text == "b"


def test_models_are_listed_and_another_one_is_not_found(client, complete):
    (model,) = client.models.list().data
    assert (model.id, model.context_length) == ("model", 16)
    assert client.models.retrieve("model") == model
    for ask in (lambda: client.models.retrieve("gpt"), lambda: complete("", model="gpt")):
        with pytest.raises(openai.NotFoundError, match="'gpt' does not exist") as refused:
            ask()
        assert refused.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "not valid JSON"),
        (b"[" * 500_000, 400, "nested too deeply"),
        (b"[]", 400, "not a JSON object"),
        (b'{"model": "model", "prompt": "\\ud800"}', 400, "half a surrogate pair"),
        (b'{"model": "model", "top_p": NaN}', 400, "must be finite"),
        (b"{}", 400, "missing key request.model"),
        (b" " * ((1 << 20) + 1), 413, "exceeds the capacity limit"),
    ],
)
def test_a_broken_body_is_told_as_json(server, body, status, message):
    got, answer = post(server, body)
    assert (got, answer["error"]["type"]) == (status, "invalid_request_error")
    assert message in answer["error"]["message"]


def test_only_programs_of_this_machine_are_served(server):
    process, url = server
    body = b'{"model": "model", "max_tokens": 1}'
    assert post(server, body, Host="localhost:1")[0] == 200
    status, answer = post(server, body, Host="rebound.example")
    assert (status, answer["error"]["message"]) == (400, "Host 'rebound.example' is not trusted.")
    # what a page of another origin can send without asking first
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert post(server, body, **{"Content-Type": kind})[0] == 415
    with urlopen(Request(f"{url}v1/models", headers={"Origin": "http://evil.example"})) as answer:
        assert "Access-Control-Allow-Origin" not in answer.headers
    listening = [c for c in psutil.Process(process).net_connections() if c.status == "LISTEN"]
    assert [connection.laddr.ip for connection in listening] == [HOST]


def connected(server):
    return socket.create_connection((HOST, int(server[1].rsplit(":")[-1].strip("/"))), timeout=60)


def as_http(body, head=""):
    """A request for completions, not encoded in chunks."""
    body = json.dumps(body).encode() if isinstance(body, dict) else body
    return (
        f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        f"{head or f'Content-Length: {len(body)}'}\r\n\r\n"
    ).encode() + body


ONE = {"model": "model", "prompt": "<", "temperature": 0, "max_tokens": 1}
BODY = json.dumps(ONE).encode()
CHUNKED = "Transfer-Encoding: chunked"


@pytest.mark.parametrize("streaming", [True, False])
def test_one_at_a_time_and_a_client_that_leaves_ends_its_own(complete, client, server, streaming):
    """ENDLESS takes longer than a client waits."""
    with connected(server) as leaving:
        leaving.sendall(as_http(ENDLESS | {"stream": streaming}))
        if streaming:
            assert leaving.recv(15) == b"HTTP/1.1 200 OK"
        impatient = client.with_options(timeout=2)
        with suppress(openai.APITimeoutError):
            while True:  # until the other has the model
                impatient.completions.create(**ONE)
    assert complete("<", max_tokens=2).choices[0].text == "b "


def test_requests_that_are_half_sent_or_drip_keep_nobody_waiting_and_end(server, complete):
    halves = [
        as_http(ONE)[:-3],  # of the body
        as_http(ONE)[:80],  # of the headers
        as_http(b"ff\r\n{", CHUNKED),
    ]
    late = {b"HTTP/1.1 408 ", b"HTTP/1.1 400 "}
    with ExitStack() as stack:
        *stalled, dripping = [stack.enter_context(connected(server)) for _ in range(40)]
        for number, client in enumerate(stalled):
            client.sendall(halves[number % len(halves)])
        before = time.monotonic()
        assert complete("<", max_tokens=2).choices[0].text == "b "
        assert time.monotonic() - before < READ_SECONDS
        with suppress(ConnectionError):  # a byte may cross the answer
            for byte in as_http(ONE):
                dripping.sendall(bytes([byte]))
                if select.select([dripping], [], [], 0.5)[0]:
                    break
            assert dripping.recv(13) in late
        assert {client.recv(13) for client in stalled} == late


def test_connections_without_a_request_hold_nobody_up(server, complete):
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(connected(server))
        assert complete("<", max_tokens=2).choices[0].text == "b "


def test_of_many_requests_at_once_each_is_answered(server):
    """200 at once: some are too many, and are told so; none is cut off."""
    with ExitStack() as stack:
        clients = [stack.enter_context(connected(server)) for _ in range(200)]
        for client in clients:
            client.sendall(as_http(ONE | {"max_tokens": 20}))
        answers = [client.recv(13) for client in clients]
    assert set(answers) <= {b"HTTP/1.1 200 ", b"HTTP/1.1 503 "}
    assert answers.count(b"HTTP/1.1 200 ") >= 60


def test_a_client_that_does_not_read_gives_the_model_back(server, client):
    body = ENDLESS | {"stream": True, "n": 64, "logprobs": 20}
    with connected(server) as stalled:
        stalled.sendall(as_http(body))
        assert stalled.recv(15) == b"HTTP/1.1 200 OK"
        patient = client.with_options(timeout=200)
        assert patient.completions.create(**ONE).choices[0].text == "b"


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (as_http(BODY, "Content-Length: -5"), b"400 "),
        (as_http(BODY, "Content-Length: " + "9" * 20), b"413 "),
        (as_http(BODY, "Content-Length: much"), b"400 "),
        (as_http(BODY, "Content-Length: 9"), b"400 "),
        (as_http(BODY, "X-None: 1"), b"400 "),
        (as_http(b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY), CHUNKED), b"200 "),
        (as_http(b"zz\r\n", CHUNKED), b"400 "),
        (as_http(b"f" * 15 + b"\r\n{", CHUNKED), b"400 "),
        (as_http(BODY, f"Expect: 100-continue\r\nContent-Length: {len(BODY)}"), b"100 "),
        (as_http(BODY, f"X-Long: {'x' * 100_000}\r\nContent-Length: {len(BODY)}"), b"413 "),
        (b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n", b"414 "),
        (b"GET /\r\n\r\n", b"400 "),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n", b"400 "),
        (b"PRI * HTTP/2.0\r\n\r\n", b"505 "),
    ],
    ids=lambda value: repr(value)[-40:],
)
def test_what_no_client_should_send_is_answered_in_a_line(server, data, answer):
    with connected(server) as client:
        client.sendall(data)
        assert client.recv(13) == b"HTTP/1.1 " + answer


def test_more_than_fits_into_memory_is_refused_with_what_it_would_take(model_config):
    config = replace(
        model_config, vocab_size=256, context_length=1 << 30, position_embedding="none"
    )
    served = Served("model", 0, TransformerLM(config), byte_tokenizer())
    asked = read_request(ONE | {"n": 128})
    prompts = read_prompts(asked, served.tokenizer, config.context_length)
    with pytest.raises(EnvironmentFault) as refused:
        next(served.answer(asked, prompts, Usage(), lambda: False))
    answer, status = fault(refused.value)
    assert status == 503
    assert answer["error"]["message"].startswith("128 completions at once need ")
    assert not served.turn.locked()


def test_requests_that_are_sent_ahead_are_answered_in_order(server):
    with connected(server) as client:
        client.sendall(as_http(ONE) + as_http(ONE | {"prompt": "b"}) + as_http(b"{"))
        answers = b""
        while b"valid JSON" not in answers:
            answers += client.recv(1 << 16)
    found = re.findall(rb'HTTP/1.1 (\d+)|"text":"(.)"', answers)
    assert found == [(b"200", b""), (b"", b"b"), (b"200", b""), (b"", b" "), (b"400", b"")]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "chat/completions",
            "there is no chat here: a base model continues a text; use /v1/com",
        ),
        ("embeddings", "/v1/embeddings: no such page; here are /, /v1/completions and /v1/models"),
    ],
)
def test_what_is_not_served_is_told_with_what_is(client, path, message):
    with pytest.raises(openai.NotFoundError) as refused:
        client.post(f"/{path}", body={"model": "model"}, cast_to=object)
    assert message in refused.value.body["message"]
    assert refused.value.code == "unknown_url"


def test_ctrl_c_ends_an_answer_and_then_the_server(folder, capsys, port):
    """In this process, where the annotations are checked."""
    events = []

    def ask():
        while not is_open(port):
            time.sleep(0.02)
        body = json.dumps(ENDLESS | {"stream": True}).encode()
        headers = {"Content-Type": "application/json"}
        with urlopen(Request(f"http://{HOST}:{port}/v1/completions", body, headers)) as answer:
            events.append(answer.readline())
            os.kill(os.getpid(), signal.SIGINT)
            events.extend(answer)

    asking = Thread(target=ask)
    asking.start()
    with pytest.raises(SystemExit) as left:
        main(["--port", str(port), "--device", "cpu", "--model", str(folder)])
    asking.join()
    assert left.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().err == "stopped\n"
    assert b'"text": "b"' in events[0]
    assert b"the server ends" in events[-2]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--port", "65536"], 2, "--port 65536: must be in [0, 65535]"),
        (["--device", "tpu"], 2, f"--device tpu: {DEVICE.text}"),
        (["--model", "nowhere"], 2, "nowhere/config.json: no such file"),
        (["--port", "{taken}"], 3, "{taken}: Address already in use; choose another with --port"),
    ],
)
def test_what_cannot_be_served_is_one_line(folder, capsys, arguments, code, message):
    with socket.create_server((HOST, 0)) as socket_:
        taken = str(socket_.getsockname()[1])
        given = [word.format(taken=taken) for word in arguments]
        with pytest.raises(SystemExit) as left:
            main(["--model", str(folder), "--device", "cpu", *given])
    assert left.value.code == code
    said = capsys.readouterr().err
    assert message.format(taken=taken) in said
    assert said.count("\n") == 1


@pytest.fixture
def page(server):
    """The playground in a browser; it may ask for nothing but the server, and not complain."""
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        asked, said = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(server[1])
        page.locator("#facts", has_text="context of 16 tokens").wait_for()
        page.fill("#temperature", "0")
        yield page
        browser.close()
    assert {url.removeprefix(server[1]) for url in asked} == {"", "v1/models", "v1/completions"}
    assert said == []


def test_the_page_shows_tokens_with_their_probabilities_and_runs_none_of_them(page):
    prompt = "<img src=x onerror=document.title='run'>\n<"
    page.fill("#prompt", prompt)
    page.fill("#max_tokens", "16")
    page.keyboard.press("Control+Enter")
    page.locator("#status", has_text="16 tokens,").wait_for()
    assert page.locator("#output").text_content() == prompt + "b id=x><b id=x><"
    assert page.locator(".token").all_text_contents() == [*"b id=x><b id=x><"]
    assert page.locator("#output :not(span)").count() == 0
    assert page.title() == "Playground"
    assert "perplexity 1.7" in page.locator("#status").text_content()  # 1 / 0.6
    page.locator(".token").first.click()
    page.keyboard.press("ArrowRight")
    assert page.locator("#token-title").text_content() == "Token 2 of 16"
    rows = page.locator("#alternatives li").all_text_contents()
    assert rows[:2] == ["␣60 %", "i30 %"]
    page.keyboard.press("Tab")  # the first that can be chosen instead
    page.keyboard.press("Enter")
    page.locator("#output .prompt", has_text="<bi").wait_for()
    page.locator("#status", has_text="16 tokens,").wait_for()
    assert page.locator("#output").text_content() == prompt + "bid=x><b id=x><b i"
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_the_page_stops_by_a_key(page):
    page.fill("#max_tokens", "65536")
    page.fill("#prompt", "<")
    page.locator("#generate").click()
    page.locator(".token").nth(9).wait_for()
    page.keyboard.press("Escape")
    page.locator("#status", has_text="stopped").wait_for()
    shown = page.locator(".token").count()
    page.locator("#continue").click()
    page.locator(".token").nth(shown % 100).wait_for()
    page.locator("#stop").click()
    page.locator("#status", has_text="stopped").wait_for()
    assert page.locator("#output").text_content().startswith(MARKUP * (shown // 8))
