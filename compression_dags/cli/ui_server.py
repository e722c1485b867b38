"""One of Dagster's commands, its daemon or its code server, while somebody holds the other end of standard input."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

#: Seconds that the command has to end.
PATIENCE = 15


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(PATIENCE)
    os._exit(1)


def main(command: str, arguments: list[str]) -> None:
    """Runs `daemon` or `code-server` until it ends; the home's database is set up by one process at a time."""
    from dagster import DagsterInstance

    from compression_dags.waiting import held

    folder = Path(os.environ["DAGSTER_HOME"])
    with held(folder.parent / "locks" / "dagster.lock", f"the set-up of {folder}"), DagsterInstance.get():
        pass
    if command == "daemon":
        from dagster._daemon.cli import cli
    else:
        from dagster._cli.code_server import code_server_cli as cli
    cli(arguments, obj={})


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        threading.Thread(target=_end_with_parent, daemon=True).start()
        main(sys.argv[1], sys.argv[2:])
