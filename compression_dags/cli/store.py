"""`compression-dags store`: how much lies in a home, whether it is whole, and what nothing needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compression_dags.errors import InputError

if TYPE_CHECKING:
    from compression_dags.resources.upkeep import Checked, Pruned, Wanted


def store_sizes(home: Path) -> dict[str, dict[str, int]]:
    from compression_dags.resources.upkeep import sizes

    return sizes(home)


def check_store(home: Path) -> Checked:
    """Every artifact against the hashes in its manifest."""
    from compression_dags.cli.lines import configure_logging
    from compression_dags.resources.upkeep import check

    configure_logging()
    _exists(home)
    return check(home)


def prune_store(home: Path, *, delete: bool, days: float, recipes_gone: bool, wait: bool) -> Pruned:
    """What nothing in the home names and is older than `days`, removed if `delete`.

    Args:
        recipes_gone: what only recipes name that the recipes folder no longer has, too.
        wait: for runs at work.

    Raises:
        InputError: runs are at work and `wait` is off.
    """
    from compression_dags.cli.lines import configure_logging
    from compression_dags.resources.upkeep import DAY, prune, survey

    configure_logging()
    _exists(home)
    wanted = _present(home) if recipes_gone else (lambda *_: True)
    if delete:
        return prune(home, older_than=days * DAY, wanted=wanted, wait=wait)
    return survey(home, older_than=days * DAY, wanted=wanted)


def _exists(home: Path) -> None:
    if not home.is_dir():
        raise InputError(f"home {home} does not exist")


def _present(home: Path) -> Wanted:
    """Whether the handles of a recipe count: those of recipes that are still there, and of what is no recipe's.

    Tasks do not count: a text may only be away for a while. The planner's candidates stay: no recipe names them, and
    they take hours. In a home of before the grid the first part of an asset's path is a recipe, or a calibration set.

    Raises:
        InputError: a recipe file cannot be read, so that nobody knows whether its recipe is gone.
    """
    from compression_dags.assets.planning import ALTERNATIVES
    from compression_dags.recipes import BASELINE, load_recipes
    from compression_dags.resources.artifact_store import RECIPE

    recipes = load_recipes()
    if unread := [str(path) for path in recipes.left_out]:
        raise InputError(f"--recipes-gone: repair or remove first, as its recipe may be there: {', '.join(unread)}")
    known = {BASELINE, *recipes}
    families = {name.replace("-", "_") for name in known} | {each.calibration.slug for each in recipes.values()}
    families |= {path.parent.name for path in (home / "handles").glob(f"*/{ALTERNATIVES}")}

    def wanted(key: tuple[str, ...], partition: str) -> bool:
        first, *more = key
        if more:
            return first in families
        if first.startswith(f"{ALTERNATIVES}."):
            return True
        name = partition if first == RECIPE else partition.partition("|")[2]
        return not name or name.partition("@")[0] in known

    return wanted


def sizes_text(home: Path, sizes: dict[str, dict[str, int]]) -> str:
    lines = [f"{kind:28} {e['artifacts']:5d} artifacts {e['bytes'] / 1e6:10.1f} MB" for kind, e in sizes.items()]
    return "\n".join(lines) or f"{home} holds no artifacts"


def checked_json(found: Checked) -> dict[str, Any]:
    """Keys are stable."""
    return {
        "artifacts": found.artifacts,
        "bytes": found.bytes,
        "damaged": found.damaged,
        "left_alone": found.left_alone,
    }


def checked_text(found: Checked) -> str:
    lines = [
        f"damaged: {entry['path']}: {file}: {problem}"
        for entry in found.damaged
        for file, problem in entry["files"].items()
    ]
    if found.damaged:
        lines.append("A run that needs one of these sets it aside and makes it again.")
    whole = found.artifacts - len(found.damaged)
    lines.append(f"{whole} of {found.artifacts} artifacts are whole ({found.bytes / 1e6:.1f} MB read)")
    return "\n".join(lines + _left(found.left_alone))


def pruned_json(home: Path, found: Pruned, deleted: bool) -> dict[str, Any]:
    """Keys are stable."""
    return {
        "removed" if deleted else "would_remove": [str(item.path.relative_to(home)) for item in found.removed],
        "bytes": found.bytes,
        "left_alone": found.left_alone,
        "failed": found.failed,
    }


def pruned_text(home: Path, found: Pruned, deleted: bool) -> str:
    verb = "removed" if deleted else "would remove (add --yes to do it)"
    lines = [f"{verb}: {len(found.removed)} ({found.bytes / 1e6:.1f} MB)"]
    lines += [f"{item.path.relative_to(home)}  ({item.reason})" for item in found.removed]
    lines += [f"could not be removed: {text}" for text in found.failed]
    return "\n".join(lines + _left(found.left_alone))


def _left(paths: list[str]) -> list[str]:
    return [f"left alone, not this project's: {path}" for path in paths]
