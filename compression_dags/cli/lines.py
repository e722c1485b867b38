"""What the command line says while it works: lines on standard error. Imports no Dagster."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from compression_dags.provenance.escaping import visible


def configure_logging() -> None:
    """One line an asset on standard error; Dagster's own chatter and library warnings stay in its event log."""
    logging.getLogger().handlers.clear()
    warnings.filterwarnings("ignore", message=".*(beta|preview|superseded).*")
    ours = logging.getLogger("compression_dags")
    ours.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Visible("%(message)s"))
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False
    os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' bars; ours say for themselves when they show
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


class _Visible(logging.Formatter):
    """Messages in which foreign text cannot steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))
