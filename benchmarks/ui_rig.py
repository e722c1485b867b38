"""`compression-dags ui` as a process, for scripts: its GraphQL, the seconds until it is ready, its memory."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

PROJECT = Path(__file__).resolve().parent.parent
LOADED = (
    "{ workspaceOrError { ... on Workspace { locationEntries { loadStatus locationOrLoadError { __typename } } } } }"
)


@dataclass(frozen=True)
class Ui:
    """One running UI.

    Attributes:
        process: the command's.
        port: on the loopback address.
        ready: seconds from the start of the process until GraphQL knew the code location.
    """

    process: subprocess.Popen[bytes]
    port: int
    ready: float = 0.0

    def ask(self, query: str, **variables: Any) -> Any:
        """The data of GraphQL's answer, asked as the page asks."""
        body = json.dumps({"query": query, "variables": variables}).encode()
        headers = {"Content-Type": "application/json", "Origin": f"http://127.0.0.1:{self.port}"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/graphql", body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            found = json.load(answer)
        assert "errors" not in found, found
        return found["data"]

    def resident(self) -> dict[str, int]:
        """What each process is called → its resident memory in MB."""
        own = psutil.Process(self.process.pid)
        found = {"web server": own.memory_info().rss >> 20}
        for child in own.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                words = " ".join(child.cmdline())
                name = next((n for word, n in _CALLED.items() if word in words), "others")
                found[name] = max(found.get(name, 0), child.memory_info().rss >> 20)
        return found


_CALLED = {"ui_server daemon": "daemon", "ui_server code-server": "code server", "api grpc": "code location"}


@contextlib.contextmanager
def opened(home: Path, environment: Mapping[str, str]) -> Iterator[Ui]:
    """The UI of a home, once its code location is loaded."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "compression_dags.cli", "ui", "--home", str(home), "--port", str(port)]
    start = time.monotonic()
    ui = Ui(subprocess.Popen(command, env=dict(environment), cwd=PROJECT), port)

    def loaded() -> bool:
        assert ui.process.poll() is None
        with contextlib.suppress(OSError):
            entries = ui.ask(LOADED)["workspaceOrError"].get("locationEntries", [])
            return [(e["locationOrLoadError"] or {}).get("__typename") for e in entries] == ["RepositoryLocation"]
        return False

    try:
        until(loaded, 180, "the code location", every=0.1)
        yield Ui(ui.process, port, round(time.monotonic() - start, 1))
    finally:
        ui.process.send_signal(signal.SIGINT)
        ui.process.wait(60)


def until(condition: Callable[[], object], seconds: float, what: str, every: float = 0.5) -> None:
    """Returns when something is so.

    Raises:
        AssertionError: it was not after so many seconds.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} took more than {seconds:.0f} seconds"
        time.sleep(every)
