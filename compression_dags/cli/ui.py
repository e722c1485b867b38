"""The `ui` verb: Dagster's web server behind a guard, its daemon and its code server, on one home."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import click
import yaml

from compression_dags.errors import InputError
from compression_dags.failures import WorkFailed
from compression_dags.recipes import load_recipes
from compression_dags.resources.home import prepare_instance
from compression_dags.resources.ui_guard import Address, Guard

#: Seconds that open connections and the daemon have to end.
PATIENCE = 5
#: What the UI calls the code location, as workspace.yaml does.
LOCATION = "compression_dags"


def open_ui(home: Path, host: str, port: int, allowed: tuple[str, ...], read_only: bool) -> None:
    """Serve until interrupted.

    Raises:
        InputError: an address or port that cannot be used, or a name that cannot be read.
        WorkFailed: Dagster's daemon ended.
    """
    names = {text: Address.of(text) for text in allowed}
    if bad := [text for text, address in names.items() if address is None]:
        raise InputError(f"--allow-host {bad[0]!r} is not NAME or NAME:PORT")
    listening = listen(host, port)
    port = listening[0].getsockname()[1]
    if open_to := exposed(listening):
        may = "read everything here" if read_only else "start and delete runs"
        click.echo(
            f"warning: {', '.join(open_to)} can be reached from other machines, and there is no password: whoever "
            f"reaches port {port} may {may}",
            err=True,
        )
    try:
        _serve(home, host, port, listening, [a for a in names.values() if a], read_only)
    except KeyboardInterrupt:
        click.echo("stopped; the same command continues", err=True)
        click.get_current_context().exit(130)


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen on every address of `host`.

    Raises:
        InputError: no such address on this machine, or the port is taken or needs more rights.
    """
    name = host.removeprefix("[").removesuffix("]")
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE) if name else []
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {host!r} is no address: {getattr(error, 'strerror', None) or error}") from None
    listening: list[socket.socket] = []
    refused: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        try:
            if listening:
                address = (address[0], listening[0].getsockname()[1], *address[2:])
            listening.append(_bound(socket.socket(family, kind, protocol), address))
        except OSError as error:
            refused = error
            if error.errno != errno.EADDRNOTAVAIL:  # `localhost` may name a family that this machine has not
                break
    if listening and (refused is None or refused.errno == errno.EADDRNOTAVAIL):
        return listening
    if refused is not None and refused.errno == errno.EADDRINUSE:
        raise InputError(f"--port {port} is in use on {host}; choose another")
    raise InputError(f"--host {host!r} --port {port} cannot be used: {(refused and refused.strerror) or 'no address'}")


def _bound(sock: socket.socket, address: Any) -> socket.socket:
    try:
        if os.name == "posix":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(128)  # at once: a second UI that starts meanwhile finds the port taken
    except OSError:
        sock.close()
        raise
    return sock


def exposed(listening: list[socket.socket]) -> list[str]:
    """Addresses that other machines may reach."""
    found = [str(sock.getsockname()[0]) for sock in listening]
    return [a for a in found if not ipaddress.ip_address(a.partition("%")[0]).is_loopback]


def _serve(
    home: Path, host: str, port: int, listening: list[socket.socket], allowed: list[Any], read_only: bool
) -> None:
    load_recipes()  # refuses a folder before anything is started
    os.environ["DAGSTER_HOME"] = str(prepare_instance(home))
    name = host.strip("[]")
    url = f"http://{f'[{name}]' if ':' in name else name}:{port}"
    with contextlib.ExitStack() as stack:
        stack.enter_context(_signals_interrupt())
        # first of all, as it takes longest; what this process imports meanwhile takes nearly as long
        ended = threading.Event()
        code = stack.enter_context(_code_server(ended))
        app, workspace = stack.enter_context(_web_server(home, code, read_only))
        children = {"code server": code.process}
        if not read_only:
            run = ["run", "--log-level", "warning", "--workspace", str(workspace)]
            children["daemon"] = stack.enter_context(_child("daemon", *run, ended=ended))
        click.echo(url, err=True)
        _run_until(ended, Guard(app, host, port, allowed, read_only), listening)
        for what, child in children.items():
            if (status := child.poll()) is not None:
                raise WorkFailed(f"Dagster's {what} ended by itself with exit code {status}")


def _run_until(ended: threading.Event, guard: Any, listening: list[socket.socket]) -> None:
    """Serve until interrupted, or until a process has `ended` without which nothing works."""
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(guard, log_level="warning", proxy_headers=False, timeout_graceful_shutdown=PATIENCE)
    )

    def stop() -> None:
        ended.wait()
        server.should_exit = True

    threading.Thread(target=stop, daemon=True).start()
    server.run(sockets=listening)


@contextlib.contextmanager
def _web_server(home: Path, code: CodeServer, read_only: bool) -> Iterator[tuple[Any, Path]]:
    """Dagster's web application on a prepared home, and the workspace file that names the code server."""
    from dagster import DagsterInstance
    from dagster._core.workspace.context import WorkspaceProcessContext
    from dagster._core.workspace.load_target import WorkspaceFileTarget
    from dagster_webserver.app import create_app_from_workspace_process_context
    from dagster_webserver.version import __version__

    from compression_dags.cli.session import prepared_ui

    with prepared_ui(home, read_only) as wait, DagsterInstance.get() as instance:
        instance.optimize_for_webserver(statement_timeout=15000, pool_recycle=3600, max_overflow=20)
        code.wait()
        wait()
        context = WorkspaceProcessContext(
            instance, WorkspaceFileTarget([str(code.workspace)]), __version__, read_only=read_only
        )
        with context:
            yield create_app_from_workspace_process_context(context, live_data_poll_rate=2000), code.workspace


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and a closed terminal stop everything in order, as Ctrl-C does."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    names = [s for s in ("SIGTERM", "SIGHUP") if hasattr(signal, s)]
    before = {name: signal.signal(getattr(signal, name), interrupt) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


@dataclass(frozen=True)
class CodeServer:
    """A server of the code location that is about to answer.

    Attributes:
        process: Dagster's proxy, which starts the server behind it anew when somebody reloads the code location.
        socket: where it listens.
        workspace: a file that names it, for web server and daemon alike.
    """

    process: subprocess.Popen[bytes]
    socket: Path
    workspace: Path

    def wait(self) -> None:
        """Returns when it answers.

        Raises:
            WorkFailed: it has ended.
        """
        from dagster._core.errors import DagsterUserCodeUnreachableError
        from dagster._grpc.client import DagsterGrpcClient

        client = DagsterGrpcClient(socket=str(self.socket))
        while True:
            with contextlib.suppress(DagsterUserCodeUnreachableError):
                client.ping("")
                return
            if (status := self.process.poll()) is not None:
                raise WorkFailed(f"Dagster's code server ended with exit code {status}")
            time.sleep(0.1)


@contextlib.contextmanager
def _code_server(ended: threading.Event) -> Iterator[CodeServer]:
    with tempfile.TemporaryDirectory(prefix="compression-dags-ui-") as folder:
        place, file = Path(folder) / "code.sock", Path(folder) / "workspace.yaml"
        named = {"socket": str(place), "location_name": LOCATION}
        file.write_text(yaml.safe_dump({"load_from": [{"grpc_server": named}]}), encoding="utf-8")
        options = ["--module-name", "compression_dags.definitions", "--location-name", LOCATION, "--socket", str(place)]
        options += ["--use-python-environment-entry-point", "--inject-env-vars-from-instance"]
        with _child("code-server", "start", *options, "--log-level", "warning", ended=ended) as process:
            yield CodeServer(process, place, file)


@contextlib.contextmanager
def _child(*command: str, ended: threading.Event) -> Iterator[subprocess.Popen[bytes]]:
    """One of Dagster's commands as a child that ends with this process, however that ends.

    Args:
        ended: set when it ends before its time.
    """
    words = [sys.executable, "-m", "compression_dags.cli.ui_server", *command]
    child = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)
    stopping = threading.Event()

    def watch() -> None:
        child.wait()
        if not stopping.is_set():
            ended.set()

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield child
    finally:
        stopping.set()
        assert child.stdin is not None
        child.stdin.close()
        try:
            child.wait(4 * PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
