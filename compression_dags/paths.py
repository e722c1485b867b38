"""Where the project's own files lie: recipes, models, data, `dagster.yaml` and `workspace.yaml`."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_SHIPPED = _PACKAGE / "shipped"
#: Folder that holds them: inside the package in an installed wheel, the repository's root in a checkout.
PROJECT = _SHIPPED if _SHIPPED.is_dir() else _PACKAGE.parent
