"""Dagster's daemon, for as long as somebody holds the other end of its standard input."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

#: Seconds that the daemon has to end.
PATIENCE = 15


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(PATIENCE)
    os._exit(1)


def main() -> None:
    from dagster._daemon.cli import cli

    threading.Thread(target=_end_with_parent, daemon=True).start()
    cli(["run", "--log-level", "warning", *sys.argv[1:]], obj={})


if __name__ == "__main__":
    main()
