"""`models add`, `models`, `models remove`, the sensor's second look, and errors that name the compute dtype."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import dagster as dg
import pytest
from click.testing import CliRunner

from compression_dags.assets.base_models import REFERENCE, base_model
from compression_dags.cli.main import main
from compression_dags.definitions import Settings, build
from compression_dags.errors import InputError, IntegrityError, naming_dtype
from compression_dags.resources.artifact_store import ArtifactStore
from compression_dags.resources.model_hub import ModelHub
from compression_dags.step import BASE
from models import edit_config, edit_weights


def cli(home: Path, *arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(main, [*arguments, "--home", str(home)])
    assert done.exit_code == code, done.output
    return done.output


def test_add_list_and_remove(model, tmp_path):
    home = tmp_path / "home"
    edit_config(model, attn_implementation="org/kernel")
    assert "note: config.json: left out attn_implementation" in cli(home, "models", "add", str(model))
    shutil.rmtree(model)
    assert "(missing; the imported copy is used)" in cli(home, "models")
    assert json.loads(cli(home, "models", "--json"))["model"]["missing"] is True
    store = ArtifactStore(home=str(home))
    assert store.recall(BASE, "model")
    assert json.loads(cli(home, "models", "remove", "model", "--json")) == {"removed": "model"}
    assert "model" not in json.loads(cli(home, "models", "--json"))
    assert store.recall(BASE, "model") is None and list((home / "artifacts" / "base_model").iterdir())
    with dg.DagsterInstance.from_config(str(home / "dagster")) as instance:
        assert instance.get_dynamic_partitions("base_model") == []
    assert json.loads((home / "models" / "digests.json").read_text()) == {}
    refused = cli(home, "models", "remove", "model", code=2)
    assert "'model' is not registered" in refused and "registered are: none" in refused


def sensor_of(tmp_path: Path, watched: Path):
    settings = Settings(tmp_path / "home", device="cpu", watch=str(watched))
    definitions = build([], settings)
    repository = definitions.get_repository_def()
    sensor = definitions.resolve_sensor_def("new_base_models")

    def tick(instance, cursor=None):
        return sensor(dg.build_sensor_context(instance=instance, repository_def=repository, cursor=cursor))

    return definitions, tick


def test_the_sensor_checks_headers_and_looks_again_when_files_change(stories, tmp_path):
    watched = tmp_path / "watched"
    model = Path(shutil.copytree(stories, watched / "broken"))
    edit_config(model, num_hidden_layers=4)
    definitions, tick = sensor_of(tmp_path, watched)
    with dg.instance_for_test() as instance:
        skipped = tick(instance)
        assert isinstance(skipped, dg.SkipReason) and "config.json counts 4 layers" in (skipped.skip_message or "")
        edit_config(model, num_hidden_layers=5)
        edit_weights(model, lambda t: t["model.norm.weight"].fill_(float("nan")))
        first = tick(instance)
        assert first.run_requests[0].tags[REFERENCE] == str(model)
        assert isinstance(tick(instance, first.cursor), dg.SkipReason)

        # the run refuses it: nothing stays, and these files are not asked for again
        instance.add_dynamic_partitions("base_model", ["broken"])
        assert not import_in_a_run(definitions, instance, first.run_requests[0])
        hub = ModelHub(home=str(tmp_path / "home"))
        assert hub.registered() == {} and instance.get_dynamic_partitions("base_model") == []
        assert isinstance(tick(instance, first.cursor), dg.SkipReason)

        shutil.copyfile(stories / "model.safetensors", model / "model.safetensors")
        again = tick(instance, first.cursor)
        assert again.run_requests[0].run_key != first.run_requests[0].run_key
        instance.add_dynamic_partitions("base_model", ["broken"])
        assert import_in_a_run(definitions, instance, again.run_requests[0])
        assert set(hub.registered()) == {"broken"}
        assert isinstance(tick(instance, again.cursor), dg.SkipReason)
        assert isinstance(tick(instance), dg.SkipReason)


def import_in_a_run(definitions, instance, request) -> bool:
    job = definitions.resolve_implicit_global_asset_job_def()
    return job.execute_in_process(
        instance=instance,
        partition_key=request.partition_key,
        asset_selection=[base_model.key],
        tags=request.tags,
        raise_on_error=False,
    ).success


@pytest.mark.parametrize(
    ("text", "dtype", "named"),
    [
        (
            "layers.0: activations are not finite; nothing can be decided",
            "float16",
            "--dtype bfloat16 or --dtype float32",
        ),
        ("the model gives a non-finite NLL", "bfloat16", "computed in bfloat16; try --dtype float32"),
        ("the Hessian is not finite; the model's activations overflow here", "float32", "computed in float32"),
        ("a scale is not positive", "float16", None),
        ("values are not finite", None, None),
    ],
)
def test_errors_of_overflow_name_the_dtype(text, dtype, named):
    for kind in (InputError, IntegrityError):
        found = naming_dtype(kind(text), dtype)
        assert type(found) is kind and text in str(found)
        assert (named in str(found)) if named else (str(found) == text)


def test_a_run_that_overflows_names_the_dtype(model, tmp_path, monkeypatch):
    edit_weights(model, lambda t: t["model.embed_tokens.weight"].mul_(1e6))
    (tmp_path / "text.txt").write_text("Once upon a time there was a little girl. " * 200)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "cut.yaml").write_text("name: cut\nstages:\n  - merge: {method: reverse, ratio: 0.2}\n")
    monkeypatch.setenv("COMPRESSION_DAGS_RECIPES", str(tmp_path / "recipes"))
    asked = ["run", "-m", str(model), "-r", "cut", "--dtype", "float16", "--device", "cpu"]
    said = cli(tmp_path / "home", *asked, "--tasks", str(tmp_path / "text.txt"), code=1)
    assert "float16" in said and "--dtype bfloat16 or --dtype float32" in said


def test_inspect_says_what_a_model_is_made_of(tmp_path):
    from any_models import tiny_config

    tiny_config("qwen3_next").save_pretrained(tmp_path / "hybrid")  # no weights are needed
    line = ["models", "inspect", str(tmp_path / "hybrid"), "--home", str(tmp_path / "home")]
    said = CliRunner().invoke(main, line)
    assert said.exit_code == 0, said.output
    assert "4 layers of 2 kinds under model.layers" in said.stdout
    assert "router: mlp.gate" in said.stdout and "experts: mlp.experts.gate_up_proj (4 x " in said.stdout
    assert "least-squares recovery: no, a router chooses between the last matrices" in said.stdout
    found = json.loads(CliRunner().invoke(main, [*line, "--json"]).stdout)
    assert found["model_type"] == "qwen3_next" and len(found["kind_of"]) == 4
    (tmp_path / "hybrid" / "config.json").write_text('{"model_type": "nothing"}')
    refused = CliRunner().invoke(main, line)
    assert refused.exit_code == 2 and "is no architecture that this version of transformers has" in refused.stderr
    assert not (tmp_path / "home").exists()
