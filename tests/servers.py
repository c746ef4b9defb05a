"""Real servers on loopback, as a team runs them: each offers a remote for DVC while in use."""

import os
import pwd
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.request import Request, urlopen

import pytest

HOST = "127.0.0.1"
SSHD = "/usr/sbin/sshd"  # an absolute path: it starts itself anew for each connection


@dataclass(frozen=True)
class Remote:
    """What DVC is told of a remote: for all, and for one user; `refused` are wrong secrets."""

    url: str
    storage: Path | None = None  # where its objects lie, if they are files
    options: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


@contextmanager
def folder(here: Path) -> Iterator[Remote]:
    """A folder that all can reach: a network drive, an external disk."""
    yield Remote(str(here), storage=here)


@contextmanager
def ssh(here: Path) -> Iterator[Remote]:
    """OpenSSH with throw-away keys; a user without rights can run it, for logins as that user."""
    if not Path(SSHD).exists():
        pytest.skip(f"no OpenSSH server: {SSHD}")
    here.mkdir()
    for name in ("host", "user", "stranger"):
        words = ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", here / name)
        subprocess.run(words, check=True)
    with reserved_port() as port:
        (here / "config").write_text(f"""
            ListenAddress {HOST}:{port}
            HostKey {here / "host"}
            AuthorizedKeysFile {here / "user.pub"}
            PidFile none
            UsePAM no
            StrictModes no
            PasswordAuthentication no
            KbdInteractiveAuthentication no
            PermitRootLogin prohibit-password
            Subsystem sftp internal-sftp
        """)
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # as Debian's service does
        with open(here / "log", "wb") as log:
            server = subprocess.Popen((SSHD, "-D", "-e", "-f", here / "config"), stderr=log)
        try:
            wait_until_open(port, server)
            yield Remote(
                f"ssh://{HOST}:{port}{here}/remote",
                storage=here / "remote",
                secrets={"user": pwd.getpwuid(os.getuid()).pw_name, "keyfile": str(here / "user")},
                refused={"keyfile": str(here / "stranger")},
            )
        finally:
            server.terminate()
            server.wait()


@contextmanager
def webdav(here: Path) -> Iterator[Remote]:
    """WsgiDAV, with a password."""
    from cheroot.wsgi import Server
    from wsgidav.wsgidav_app import WsgiDAVApp

    (here / "team").mkdir(parents=True)  # DVC makes the folders below, not this one
    application = WsgiDAVApp({
        "provider_mapping": {"/": str(here)},
        "simple_dc": {"user_mapping": {"*": {"ann": {"password": "right"}}}},
        "logging": {"enable": False},
    })  # fmt: skip
    server = Server((HOST, 0), application)
    server.prepare()
    thread = Thread(target=server.serve)
    thread.start()
    try:
        yield Remote(
            f"webdav://{HOST}:{server.bind_addr[1]}/team",
            storage=here / "team",
            secrets={"user": "ann", "password": "right"},
            refused={"password": "wrong"},
        )
    finally:
        server.stop()
        thread.join()


@contextmanager
def s3(here: Path) -> Iterator[Remote]:
    """moto's server, which speaks S3 and believes any key."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(HOST, 0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    endpoint = f"http://{HOST}:{port}"
    urlopen(Request(f"{endpoint}/team", method="PUT")).close()
    try:
        yield Remote(
            "s3://team/dvc",
            options={"endpointurl": endpoint},
            secrets={"access_key_id": "ann", "secret_access_key": "any"},
        )
    finally:
        urlopen(Request(f"{endpoint}/moto-api/reset", method="POST")).close()
        server.stop()


class Quiet(SimpleHTTPRequestHandler):
    """Python's server of files, without its log."""

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def http(here: Path, certificate: Path | None = None) -> Iterator[Remote]:
    """A folder's files for reading, by HTTPS if there is a certificate (with its key)."""
    server = ThreadingHTTPServer((HOST, 0), partial(Quiet, directory=here))
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        scheme = "https" if certificate else "http"
        yield Remote(f"{scheme}://{HOST}:{server.server_port}", storage=here)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def self_signed_certificate(file: Path) -> Path:
    """A certificate of this host with its key, in one file; skips the test without openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate")
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-keyout",
             file, "-out", file.with_suffix(".crt"), "-subj", "/CN=here",
             "-addext", f"subjectAltName=IP:{HOST}"]  # fmt: skip
    subprocess.run(words, check=True, capture_output=True)
    with open(file, "a") as key:
        key.write(file.with_suffix(".crt").read_text())
    return file


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port on which nobody listens, and which nobody else is given meanwhile.

    A server that sets SO_REUSEADDR, as they all do, can still listen there.
    """
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((HOST, 0))
        yield taken.getsockname()[1]


def wait_until_open(port: int, server: "subprocess.Popen[bytes]") -> None:
    """Wait until a server takes connections; fails if it ends before."""
    for _ in range(6000):
        assert server.poll() is None, f"{server.args} ended with {server.returncode}"
        with socket.socket() as client:
            if client.connect_ex((HOST, port)) == 0:
                return
        time.sleep(0.01)
    raise AssertionError(f"{server.args} does not listen")


WRITABLE = {"folder": folder, "ssh": ssh, "webdav": webdav, "s3": s3}
SERVERS = WRITABLE | {"http": http}
