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
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import click
import yaml

from compression_dags.cli.session import prepare_instance, prepared_ui
from compression_dags.errors import InputError
from compression_dags.failures import WorkFailed
from compression_dags.paths import PROJECT

#: Seconds that open connections and the daemon have to end.
PATIENCE = 5


def open_ui(home: Path, host: str, port: int, allowed: tuple[str, ...], read_only: bool) -> None:
    """Serve until interrupted.

    Raises:
        InputError: an address or port that cannot be used, or a name that cannot be read.
        WorkFailed: Dagster's daemon ended.
    """
    from compression_dags.resources.ui_guard import Address

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
    import uvicorn
    from dagster import DagsterInstance
    from dagster._core.workspace.context import WorkspaceProcessContext
    from dagster._core.workspace.load_target import WorkspaceFileTarget
    from dagster_webserver.app import create_app_from_workspace_process_context
    from dagster_webserver.version import __version__

    from compression_dags.resources.ui_guard import Guard

    os.environ["DAGSTER_HOME"] = str(prepare_instance(home))
    name = host.strip("[]")
    url = f"http://{f'[{name}]' if ':' in name else name}:{port}"
    with contextlib.ExitStack() as stack:
        stack.enter_context(_signals_interrupt())
        with prepared_ui(home, read_only) as wait:
            instance = stack.enter_context(DagsterInstance.get())
            instance.optimize_for_webserver(statement_timeout=15000, pool_recycle=3600, max_overflow=20)
            workspace = stack.enter_context(_code_servers(instance))
            wait()
        context = WorkspaceProcessContext(instance, WorkspaceFileTarget([workspace]), __version__, read_only=read_only)
        app: Any = create_app_from_workspace_process_context(stack.enter_context(context), live_data_poll_rate=2000)
        guard = Guard(app, host, port, allowed, read_only)
        server = uvicorn.Server(
            uvicorn.Config(
                guard,  # pyright: ignore[reportArgumentType]
                log_level="warning",
                proxy_headers=False,
                timeout_graceful_shutdown=PATIENCE,
            )
        )
        daemon = None if read_only else stack.enter_context(_daemon(workspace, server))
        click.echo(url, err=True)
        server.run(sockets=listening)
        if daemon is not None and (code := daemon.poll()) is not None:
            raise WorkFailed(f"Dagster's daemon ended by itself with exit code {code}")


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


@contextlib.contextmanager
def _code_servers(instance: Any) -> Iterator[str]:
    """A workspace file that names one running code server, for web server and daemon alike (as `dagster dev` does).

    The servers end by themselves when nobody asks for them any more, so that none outlives a killed UI.
    """
    from dagster._cli.proxy_server_manager import ProxyServerManager
    from dagster._core.workspace.load_target import WorkspaceFileTarget

    target = WorkspaceFileTarget([str(PROJECT / "workspace.yaml")])
    with (
        ProxyServerManager(instance, target, code_server_log_level="WARNING") as servers,
        tempfile.TemporaryDirectory(prefix="compression-dags-ui-") as folder,
    ):
        file = Path(folder) / "workspace.yaml"
        file.write_text(yaml.safe_dump({"load_from": servers.get_code_server_specs()}))
        yield str(file)


@contextlib.contextmanager
def _daemon(workspace: str, server: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Dagster's daemon as a child that ends with this process, however that ends; `server` stops when it does."""
    command = [sys.executable, "-m", "compression_dags.cli.ui_daemon", "--workspace", workspace]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    stopping = threading.Event()

    def watch() -> None:
        child.wait()
        if not stopping.is_set():
            server.should_exit = True

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
