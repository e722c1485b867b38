"""Makes Dagster's SQLite storages cheaper to open, for tests: what they build anew at every call is built once.

Each new database (one a run) reads all migration files, and each of the hundreds of connections of a run makes an
engine whose compiled statements are thrown away. The connections themselves stay: they are opened and closed as ever.
"""

from typing import Any

import dagster._core.storage.event_log.sqlite.sqlite_event_log as events
import dagster._core.storage.runs.sqlite.sqlite_run_storage as runs
import dagster._core.storage.schedules.sqlite.sqlite_schedule_storage as schedules
from alembic.config import Config
from alembic.script import ScriptDirectory
from dagster._core.storage.sql import get_alembic_config

_STORAGES = (events, runs, schedules)


def install() -> None:
    """Once a process; children of `forked`'s server inherit what it has read."""
    if hasattr(ScriptDirectory.from_config, "cache"):
        return
    ScriptDirectory.from_config = _Scripts(ScriptDirectory.from_config)
    for storage in _STORAGES:
        storage.create_engine = _Engines(storage.create_engine)
        ScriptDirectory.from_config(get_alembic_config(storage.__file__)).as_revision_number("head")


class _Scripts:
    def __init__(self, make: Any):
        self.make, self.cache = make, dict[str | None, ScriptDirectory]()

    def __call__(self, config: Config) -> ScriptDirectory:
        place = config.get_main_option("script_location")
        if place not in self.cache:
            self.cache[place] = self.make(config)
        return self.cache[place]


class _Engines:
    def __init__(self, make: Any):
        self.make, self.cache = make, dict[str, Any]()

    def __call__(self, url: str, **options: Any):
        key = f"{url} {options}"
        if key not in self.cache:
            self.cache[key] = self.make(url, **options)
        return self.cache[key]
