"""A method, a stage and a task of one's own: each is one file, and one line where it is registered."""

import json

from forked import command_line

from compression_dags.paths import PROJECT

#: One file: a stage with its method and its worker, and a merge method.
TOYS = """
from typing import Any, ClassVar, Literal

from compression_dags.checkpoints.size import record_size
from compression_dags.depth.methods.reverse import Reverse
from compression_dags.provenance.decisions import Decision
from compression_dags.stage import Stage
from compression_dags.step import WEIGHTS, Kind, Step


class ReverseToo(Reverse):
    method: Literal["reverse-too"] = "reverse-too"


class Halve(Stage):
    stage: ClassVar[str] = "scale"
    version: ClassVar[str] = "1"
    kinds: ClassVar[tuple[Kind, ...]] = (Kind("scaled_weights", "Scaled.", (WEIGHTS,), weights=True),)
    method: Literal["halve"] = "halve"

    def steps(self, chain):
        return (Step("scaled_weights", "1", self.options(), (WEIGHTS,), "toys:scale", self, weights=True),)


def scale(job) -> dict[str, Any]:
    from compression_dags.recovery.results import write_recovered

    source = job.checkpoint()
    written = write_recovered(source, {"model.norm.weight": source.tensor("model.norm.weight") / 2}, job.target)
    job.decide([Decision("scale", "halve", 0, "model.norm", "keep", [], 0.5, "factor", "a toy", {})])
    return record_size(written, job.out)
"""
RUN = """
import sys
for name in [name for name in sys.modules if name.partition(".")[0] == "compression_dags"]:
    del sys.modules[name]  # what a process that started by itself has not imported yet
sys.path.append({folder!r})
from compression_dags.registry import METHODS
import toys
METHODS["merge"]["reverse-too"] = toys.ReverseToo
METHODS["scale"] = {{"halve": toys.Halve}}
from compression_dags.cli.main import main
main(sys.argv[1:])
"""
RECIPE = """name: own
calibration: {sequences: 8, length: 64}
stages:
  - merge: {method: reverse-too, ratio: 0.2}
  - scale: {method: halve}
evaluate: [own_text]
"""


def test_a_toy_method_stage_and_task_take_one_line_each(tmp_path):
    (tmp_path / "toys.py").write_text(TOYS)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "own.yaml").write_text(RECIPE)
    (tmp_path / "text.txt").write_text("Once upon a time there was a little cat. " * 100)
    book = (PROJECT / "recipes" / "evaluation.yaml").read_text()
    line = f"  own_text: {{kind: perplexity, file: {tmp_path / 'text.txt'}}}\n"
    (tmp_path / "recipes" / "evaluation.yaml").write_text(book.replace("tasks:\n", "tasks:\n" + line, 1))
    environment = {
        "COMPRESSION_DAGS_RECIPES": str(tmp_path / "recipes"),
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
    }
    command = ["run", "-m", "stories260k", "-r", "own", "--json", "--home", str(tmp_path / "home")]
    done = command_line(*command, environment=environment, code=RUN.format(folder=str(tmp_path)))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)["recipes"]["own"]
    assert found["layers"] == 4 and "scaled_weights" in found["checkpoint"]
    assert list(found["assets"])[1:] == [
        "merge_plan",
        "merged_weights",
        "scaled_weights",
        "compressed_model",
        "eval_own_text",
        "samples",
        "scorecard",
    ]
