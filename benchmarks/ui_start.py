"""Seconds until the UI is ready and memory of its processes, on a home of many base models and recipes.

    python benchmarks/ui_start.py --folder /tmp/start [--models 20] [--recipes 200] [--starts 3] [--tiny]

Makes a home in a new folder with that many base models (all of them stories260k) and recipes, then starts
`compression-dags ui` on it several times. Ready is when GraphQL knows the code location and every partition of the two
axes. The first start stores and reports every recipe. Prints one JSON line.
"""

import argparse
import json
import os
import shutil
from pathlib import Path
from statistics import median

from click.testing import CliRunner
from ui_rig import PROJECT, opened

from compression_dags.cli.main import main as command_line

KEYS = """query($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) { ... on AssetNode {
  partitionKeysByDimension { name partitionKeys } } } }"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="made; must not be there")
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--recipes", type=int, default=200)
    parser.add_argument("--starts", type=int, default=3, help="starts after the first")
    parser.add_argument("--tiny", action="store_true", help="one base model, two recipes, one start after the first")
    options = parser.parse_args()
    if options.tiny:
        options.models, options.recipes, options.starts = 1, 2, 1
    folder = options.folder.absolute()
    environment = prepared(folder, options.models, options.recipes)
    ready, memory = list[float](), dict[str, int]()
    for _ in range(1 + options.starts):
        with opened(folder / "home", environment) as ui:
            ready.append(ui.ready)
            found = ui.ask(KEYS, key={"path": ["compressed_model"]})["assetNodeOrError"]["partitionKeysByDimension"]
            counts = {axis["name"]: len(axis["partitionKeys"]) for axis in found}
            # the baseline is a recipe of its own
            assert counts == {"base_model": options.models, "recipe": options.recipes + 1}, counts
            memory = {name: max(size, memory.get(name, 0)) for name, size in ui.resident().items()}
    print(
        json.dumps(
            {
                "base_models": options.models,
                "recipes": options.recipes,
                "first_start_s": ready[0],
                "later_start_s": round(median(ready[1:]), 1),
                "resident_mb": memory,
            }
        )
    )


def prepared(folder: Path, models: int, recipes: int) -> dict[str, str]:
    """The environment of the project's commands, with so many recipes and a home with so many base models."""
    (folder / "recipes").mkdir(parents=True)
    for number in range(recipes):
        stage = f"merge: {{method: reverse, ratio: {0.2 + number / 1000}}}"
        text = f"name: reverse-{number}\nevaluate: [heldout_stories]\nstages: [{stage}]\n"
        (folder / "recipes" / f"reverse-{number}.yaml").write_text(text)
    shutil.copyfile(PROJECT / "recipes" / "evaluation.yaml", folder / "recipes" / "evaluation.yaml")
    environment = {**os.environ, "COMPRESSION_DAGS_RECIPES": str(folder / "recipes"), "HF_HUB_OFFLINE": "1"}
    os.environ.update(environment)
    for number in range(models):
        add = ["models", "add", str(PROJECT / "models" / "stories260k"), "--name", f"model-{number}"]
        done = CliRunner().invoke(command_line, [*add, "--home", str(folder / "home")], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    return environment


if __name__ == "__main__":
    main()
