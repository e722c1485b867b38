"""Where the project's own files lie: recipes, models, data, `dagster.yaml` and `workspace.yaml`."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_SHIPPED = _PACKAGE / "shipped"
#: Folder that holds them: inside the package in an installed wheel, the repository's root in a checkout.
PROJECT = _SHIPPED if _SHIPPED.is_dir() else _PACKAGE.parent


def what_is(path: Path) -> str:
    """What stands at a path, in words, for a message about a file or folder that cannot be used."""
    if path.is_file():
        return "is a file"
    if path.is_dir():
        return "is a directory"
    if path.is_symlink() and not path.exists():
        return "is a link to nothing"
    return "is a pipe, socket or device" if path.exists() else "does not exist"
