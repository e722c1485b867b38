"""The guard in front of the UI: what passes, what does not, and that Dagster behind it would have done it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from compression_dags.cli.ui import exposed, listen
from compression_dags.errors import InputError
from compression_dags.resources.ui_guard import Address, Guard, plain_host

JSON = {"content-type": "application/json"}
MUTATION = "mutation { reloadWorkspace { __typename } }"
HOST = "127.0.0.1:3000"


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """An app that answers everything, with the body it was sent."""
    if scope["type"] == "websocket":
        socket = WebSocket(scope, receive, send)
        await socket.accept()
        with contextlib.suppress(WebSocketDisconnect):
            while True:
                await socket.send_text(await socket.receive_text())
        return
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    await PlainTextResponse(body or b"passed")(scope, receive, send)


def client(host: str = "127.0.0.1", allowed: tuple[str, ...] = (), read_only: bool = False, app: Any = echo):
    names = [a for text in allowed if (a := Address.of(text))]
    return TestClient(Guard(app, host, 3000, names, read_only), base_url=f"http://{HOST}")


def status(method: str, path: str, headers: dict[str, str] | None = None, content: str | None = None, **made: Any):
    return client(**made).request(method, path, headers=headers, content=content).status_code


QUERY = '{"query": "{ version }"}'
OWN = {"origin": f"http://{HOST}", "sec-fetch-site": "same-origin"}
LINK = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}


@pytest.mark.parametrize(
    ("method", "path", "headers", "content"),
    [
        ("GET", "/", {}, None),
        ("GET", "/runs?query=mutation", OWN, None),
        ("HEAD", "/", {"host": "localhost:3000"}, None),
        ("GET", "/", {"host": "LOCALHOST.:3000"}, None),
        ("GET", "/", {"host": "[::1]:3000", "origin": "http://[0:0:0:0:0:0:0:1]:3000"}, None),
        ("GET", "/assets", LINK, None),
        ("GET", "/graphql", {"sec-fetch-site": "none"}, None),
        ("GET", "/graphql?query={version}", {}, None),
        ("GET", "/graphql?query=query+mutation{version}", {}, None),
        ("POST", "/graphql?op=Mutation", JSON | OWN, '{"query": "mutation { a }"}'),
        ("POST", "/graphql", {"content-type": "application/json; charset=utf-8"}, QUERY),
        ("POST", "/report_asset_materialization/a/b", JSON, "{}"),
    ],
)
def test_passes(method: str, path: str, headers: dict[str, str], content: str | None):
    assert status(method, path, headers, content) == 200


@pytest.mark.parametrize(
    ("method", "path", "headers", "content", "wanted"),
    [
        # a foreign name for this port: DNS rebinding
        ("GET", "/", {"host": "evil.example:3000"}, None, 403),
        ("GET", "/", {"host": "127.0.0.1.evil.example:3000"}, None, 403),
        ("GET", "/", {"host": "localhost"}, None, 403),
        ("GET", "/", {"host": "localhost:3001"}, None, 403),
        ("GET", "/", {"host": "127.0.0.1:3000@evil.example"}, None, 400),
        ("GET", "/", {"host": "evil.example/127.0.0.1:3000"}, None, 400),
        ("GET", "/", {"host": "localhost:99999"}, None, 400),
        ("GET", "/", {"host": ""}, None, 400),
        # a foreign page
        ("GET", "/graphql?query={version}", {"origin": "http://evil.example"}, None, 403),
        ("GET", "/", {"origin": "http://127.0.0.1:8000"}, None, 403),
        ("GET", "/", {"origin": "https://127.0.0.1:3000.evil.example"}, None, 403),
        ("POST", "/graphql", JSON | {"origin": "null"}, QUERY, 403),
        ("POST", "/graphql", JSON | {"origin": f"file://{HOST}"}, QUERY, 403),
        ("POST", "/graphql", JSON | {"sec-fetch-site": "same-site"}, QUERY, 403),
        ("GET", "/logs/a", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, None, 403),
        ("GET", "/", LINK | {"sec-fetch-dest": "iframe"}, None, 403),
        ("POST", "/graphql", JSON | LINK, QUERY, 403),
        ("OPTIONS", "/graphql", {"origin": "http://evil.example"}, None, 403),
        # mutations by GET
        ("GET", "/graphql?query=mutation{a}", {}, None, 403),
        ("GET", "/graphql/?query=mutation{a}", {}, None, 403),
        ("GET", "/graphql?query={version}&query=mutation{a}", {}, None, 403),
        ("GET", "/graphql?query=query+A{version}+mutation+B{a}&operationName=B", {}, None, 403),
        ("GET", "/graphql?query=%23x%0Amutation{a}", {}, None, 403),
        ("GET", "/graphql?query=mutation", {}, None, 400),
        ("GET", "/graphql?query=" + "{a" * 3000, {}, None, 400),
        ("GET", "/report_asset_check/a", {}, None, 405),
        # what forms can send
        ("POST", "/graphql", {"content-type": "text/plain"}, QUERY, 415),
        ("POST", "/graphql", {"content-type": "text/plain; application/json"}, QUERY, 415),
        ("POST", "/graphql?query=mutation{a}", {"content-type": "application/x-www-form-urlencoded"}, "a=b", 415),
        ("POST", "/graphql?query=mutation{a}", {}, None, 415),
        ("POST", "/report_asset_materialization/a?data_version=1", {}, None, 415),
        ("POST", "/", JSON, "{}", 405),
        ("PUT", "/graphql", JSON, QUERY, 405),
        ("DELETE", "/runs", {}, None, 405),
    ],
)
def test_is_refused(method: str, path: str, headers: dict[str, str], content: str | None, wanted: int):
    answer = client().request(method, path, headers=headers, content=content)
    assert answer.status_code == wanted and answer.text.startswith("refused: ") and answer.text.count("\n") == 1
    assert answer.headers["content-type"].startswith("text/plain") and "nosniff" in answer.headers.values()


@pytest.mark.parametrize("header", ["host", "origin"])
def test_a_header_that_is_there_twice(header: str):
    values = [(header, f"http://{HOST}" if header == "origin" else HOST)] * 2
    assert client().get("/", headers=[("host", HOST), *values] if header == "origin" else values).status_code == 400


def test_further_names():
    proxy: dict[str, Any] = {"allowed": ("dags.example.org", "LocalHost:9999")}
    assert status("GET", "/", {"host": "dags.example.org", "origin": "https://dags.example.org"}, **proxy) == 200
    assert status("GET", "/", {"host": "dags.example.org:8443"}, **proxy) == 200
    assert status("GET", "/", {"host": "localhost:9999"}, **proxy) == 200
    assert status("GET", "/", {"host": "localhost:9998"}, **proxy) == 403
    assert status("GET", "/", {"host": "dags.example.org", "origin": "https://evil.example.org"}, **proxy) == 403
    assert status("GET", "/", {"host": "my-box:3000"}, host="my-box") == 200


def test_a_wildcard_answers_to_the_address_that_was_asked():
    """The test client's own address, 127.0.0.1, stands for it; names are refused all the same."""
    assert status("GET", "/", {"host": HOST}, host="0.0.0.0") == 200
    assert status("GET", "/", {"host": "evil.example:3000"}, host="0.0.0.0") == 403
    assert status("GET", "/", {"host": "10.0.0.7:3000"}, host="0.0.0.0") == 403


def test_addresses():
    assert Address.of("[::1]:80") == Address("::1", 80) and Address.of("a.B.", 5) == Address("a.b", 5)
    assert plain_host("[0:0::1]") == "::1"
    for bad in ("", ":80", "a:", "a b", "a/b", "a?b", "a#b", "u@a", "[::1", "a:b", "a:-1", "ä.example"):
        assert Address.of(bad) is None, bad


@pytest.mark.parametrize(
    ("path", "content", "wanted"),
    [
        ("/graphql", QUERY, 200),
        ("/graphql", f'[{QUERY}, {{"query": "mutation {{ a }}"}}]', 403),
        ("/graphql", '{"query": "query A { a } mutation B { b }", "operationName": "B"}', 403),
        ("/graphql", '{"query": "{ a }", "query": "mutation { b }"}', 403),
        ("/graphql", "{", 400),
        ("/graphql", '{"query": 3}', 400),
        ("/graphql", "[" * 100_000, 400),
        ("/report_asset_check/a", "{}", 403),
    ],
)
def test_read_only(path: str, content: str, wanted: int):
    answer = client(read_only=True).post(path, headers=JSON, content=content)
    assert answer.status_code == wanted
    if wanted == 200:
        assert answer.text == content  # the app still gets the body


def test_no_foreign_page_may_show_it_in_a_frame():
    assert client().get("/").headers["x-frame-options"] == "SAMEORIGIN"


@pytest.mark.parametrize("headers", [{"origin": "http://evil.example"}, {"host": "evil.example:3000"}])
def test_websockets_of_foreign_pages(headers: dict[str, str]):
    with client().websocket_connect("/graphql", headers={"origin": f"http://{HOST}", "host": HOST}) as open_socket:
        open_socket.send_text("x")
        assert open_socket.receive_text() == "x"
    with pytest.raises(WebSocketDisconnect), client().websocket_connect("/graphql", headers={"host": HOST} | headers):
        pass


def test_websockets_of_a_read_only_ui():
    start = '{"type": "start", "id": "1", "payload": {"query": "subscription { a }"}}'
    with client(read_only=True).websocket_connect("/graphql", headers={"host": HOST}) as open_socket:
        open_socket.send_text(start)
        assert open_socket.receive_text() == start
        open_socket.send_text(start.replace("subscription", "mutation"))
        with pytest.raises(WebSocketDisconnect):
            open_socket.receive_text()


@pytest.fixture(scope="module")
def dagster_app(tmp_path_factory) -> Iterator[Any]:
    """Dagster's own web server, without code."""
    from dagster import DagsterInstance
    from dagster._core.workspace.context import WorkspaceProcessContext
    from dagster._core.workspace.load_target import EmptyWorkspaceTarget
    from dagster_webserver.app import create_app_from_workspace_process_context

    with (
        DagsterInstance.local_temp(str(tmp_path_factory.mktemp("dagster"))) as instance,
        WorkspaceProcessContext(instance, EmptyWorkspaceTarget()) as context,
    ):
        yield create_app_from_workspace_process_context(context)


def test_dagster_itself_would_have_done_it(dagster_app):
    evil = {"host": "evil.example", "origin": "http://evil.example"}
    done = TestClient(dagster_app).get("/graphql", params={"query": MUTATION}, headers=evil)
    assert done.json()["data"]["reloadWorkspace"]["__typename"] == "Workspace"
    guarded = client(app=dagster_app)
    assert guarded.get("/graphql", params={"query": MUTATION}, headers=evil).status_code == 403
    assert guarded.get("/graphql", params={"query": MUTATION}).status_code == 403
    assert guarded.post("/graphql", json={"query": MUTATION}, headers=OWN).json() == done.json()
    assert "dagster" in guarded.get("/", headers=LINK).text.lower()
    reading = client(app=dagster_app, read_only=True)
    assert reading.post("/graphql", json={"query": MUTATION}, headers=OWN).status_code == 403
    assert "version" in reading.post("/graphql", json={"query": "{ version }"}, headers=OWN).json()["data"]


def test_the_postgres_template(tmp_path, monkeypatch):
    """SQLAlchemy 2.1 reads `postgresql://` as another driver than the one that dagster-postgres needs."""
    import yaml

    from compression_dags.resources.home import POSTGRES_URL, prepare_instance

    monkeypatch.setenv(POSTGRES_URL, "postgresql://me:secret@db:5432/dags")
    written = (prepare_instance(tmp_path) / "dagster.yaml").read_text()
    assert os.environ[POSTGRES_URL] == "postgresql+psycopg2://me:secret@db:5432/dags"
    prepare_instance(tmp_path)
    assert os.environ[POSTGRES_URL] == "postgresql+psycopg2://me:secret@db:5432/dags"
    assert "storage" not in yaml.safe_load(written)
    template = yaml.safe_load(re.sub("(?m)^# ", "", written[written.index("# storage:") :]))
    assert template == {"storage": {"postgres": {"postgres_url": {"env": POSTGRES_URL}}}}


def test_a_port_in_use():
    (first,) = listen("127.0.0.1", 0)
    port = first.getsockname()[1]
    with pytest.raises(InputError, match=f"--port {port} is in use on 127.0.0.1"):
        listen("127.0.0.1", port)
    first.close()
    (again,) = listen("127.0.0.1", port)
    again.close()


@pytest.mark.parametrize("host", ["no such host", "256.1.1.1", "", "a" * 300])
def test_hosts_that_are_none(host: str):
    with pytest.raises(InputError, match=re.escape(f"--host {host!r}")):
        listen(host, 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0.0.0.0"])
def test_what_others_can_reach(host: str):
    if host == "[::1]" and not socket.has_ipv6:
        pytest.skip("no IPv6")
    try:
        listening = listen(host, 0)
    except InputError:
        if host != "[::1]":
            raise
        pytest.skip("no IPv6 address")
    assert exposed(listening) == (["0.0.0.0"] if host == "0.0.0.0" else [])
    assert len({sock.getsockname()[1] for sock in listening}) == 1
    for sock in listening:
        sock.close()


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_the_whole_ui_starts_and_leaves_nobody_behind(end: signal.Signals, tmp_path):
    command = [sys.executable, "-m", "compression_dags.cli", "ui", "--home", str(tmp_path), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    url = next(line.strip() for line in process.stderr if line.startswith("http://"))
    with urllib.request.urlopen(f"{url}/server_info") as answer:
        assert answer.status == 200
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(children) >= 2
    process.send_signal(end)
    assert process.wait(60) == (130 if end == signal.SIGINT else -end)
    deadline = time.monotonic() + 90
    while left := [pid for pid in children if os.path.exists(f"/proc/{pid}")]:
        assert time.monotonic() < deadline, left
        time.sleep(1)


@pytest.mark.slow
def test_the_ui_ends_with_a_child_that_it_needs(tmp_path):
    command = [sys.executable, "-m", "compression_dags.cli", "ui", "--home", str(tmp_path), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    next(line for line in process.stderr if line.startswith("http://"))
    found = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "code-server"], capture_output=True, text=True)
    os.kill(int(found.stdout), signal.SIGKILL)
    assert process.wait(60) == 1
    assert "Dagster's code server ended by itself with exit code -9" in process.stderr.read()
