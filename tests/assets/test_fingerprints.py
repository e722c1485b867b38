"""What can change a result is in its fingerprint, and nothing of the machine is: every step of the graph."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from dry_runs import dry_run

from compression_dags.recipes import Recipe, load_recipe
from compression_dags.registry import METHODS
from compression_dags.sparsity.allocators import ALLOCATORS

#: Together they run every kind of step.
WHOLE = """
name: whole
calibration: {corpus: CORPUS, sequences: 8, length: 64, samples: 64}
stages:
  - merge: {method: mka, ratio: 0.2}
  - recover: {method: linear-patch}
  - recover: {method: distill-mp, corpora: [CORPUS]}
  - sparsify: {method: sparsegpt, sparsity: 0.5, allocation: {method: als}}
  - quantize: {method: gptq, scheme: W4A16, bits: 3.5}
"""
SPARSE = """
name: sparse
calibration: {corpus: CORPUS, sequences: 8, length: 64, samples: 64}
stages: [sparsify: {method: wanda, sparsity: 0.5, allocation: {method: als}}]
"""

MIXED = """
name: mixed
calibration: {corpus: CORPUS, sequences: 8, length: 64, samples: 64}
stages: [quantize: {method: rtn, scheme: W4A16, bits: 5}]
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "own.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"A small story, number {i}."}) for i in range(40)))
    return path


def recipes_on(corpus: Path) -> dict[str, Recipe]:
    """Recipes that calibrate, and distil, on a text of one's own."""
    found = {}
    for text in (WHOLE, SPARSE, MIXED):
        file = corpus.with_name("recipe.yaml")
        file.write_text(text.replace("CORPUS", json.dumps(str(corpus))))
        recipe = load_recipe(file)
        found[recipe.name] = recipe
    return found


@pytest.fixture(scope="module")
def first(tmp_path_factory, corpus):
    return dry_run(tmp_path_factory.mktemp("first"), recipes_on(corpus))


def test_the_recipes_run_every_kind_of_step(first):
    kinds = {request.kind for request in first.requests.values()}
    assert kinds >= {
        "base_model",
        "calibration_tokens",
        "calibration_activations",
        "similarity_npib",
        "similarity_redundancy",
        "merge_plan",
        "merged_weights",
        "recovered_weights",
        "sparsity_plan",
        "sparse_weights",
        "quantization_plan",
        "quantized_weights",
        "evaluation",
        "samples",
        "scorecard",
    }


def test_any_declared_input_option_or_version_changes_the_fingerprint(first):
    for key, request in first.requests.items():
        changed = [replace(request, version=request.version + "+"), replace(request, numeric={"device": "other"})]
        changed += [replace(request, inputs={**request.inputs, role: "other"}) for role in request.inputs]
        changed += [replace(request, config={**request.config, name: "other"}) for name in request.config]
        assert all(other.fingerprint != request.fingerprint for other in changed), key


def test_nothing_of_the_machine_is_in_a_fingerprint(first, tmp_path, corpus, monkeypatch):
    """Another home, another place of the same text, another time and another working directory: equal fingerprints."""
    elsewhere = tmp_path / "a b" / "own.jsonl"
    elsewhere.parent.mkdir()
    shutil.copyfile(corpus, elsewhere)
    monkeypatch.chdir(tmp_path)
    again = dry_run(tmp_path / "second home", recipes_on(elsewhere))

    def by_step(dry):
        return sorted((key, request.fingerprint) for key, request in dry.requests.items())

    assert by_step(again) == by_step(first)
    machine = str(tmp_path)
    assert not any(machine in json.dumps(request.config) for request in again.requests.values())


def test_a_changed_text_changes_calibration_and_distillation(first, tmp_path, corpus):
    text = corpus.read_text()
    corpus.write_text(text.replace("number 7", "number seven"))
    after = dry_run(tmp_path, recipes_on(corpus))
    corpus.write_text(text)
    here, there = (d.requests["whole/recovered_weights_2"] for d in (first, after))
    assert here.inputs["corpus_0"] != there.inputs["corpus_0"]
    assert here.inputs["calibration_tokens"] != there.inputs["calibration_tokens"]


def test_a_raised_version_of_any_method_reaches_the_steps_that_run_it(first, tmp_path, corpus, monkeypatch):
    groups = [*METHODS.values(), ALLOCATORS]
    kinds = {kind for group in groups for kind in group.values()}
    for kind in kinds:
        monkeypatch.setattr(kind, "version", kind.version + "+")
    after = dry_run(tmp_path, recipes_on(corpus))
    decided = ("merge_plan", "recovered_weights", "sparsity_plan", "sparse_weights", "quantization_plan")
    for key, fingerprint in first.fingerprints(*decided, "quantized_weights").items():
        assert after.requests[key].fingerprint != fingerprint, key
    mixed = "mixed/quantization_plan"
    assert after.requests[mixed].inputs == first.requests[mixed].inputs
    shared = ("calibration_activations", "base_model/base_model")
    assert after.fingerprints(*shared) == first.fingerprints(*shared)


@pytest.mark.parametrize(("stage", "method"), [(stage, method) for stage, group in METHODS.items() for method in group])
def test_every_option_of_a_method_is_in_its_fingerprint(stage, method):
    """Defaults are written out; only the places of texts are left out, whose digests stand for them."""
    kind = METHODS[stage][method]
    needed = {
        "merge": {"layers": 1} if method != "planned" else {"drop": [2]},
        "recover": {},
        "sparsify": {"sparsity": 0.5},
        "quantize": {"scheme": "W4A16"},
    }[stage]
    built = kind.model_validate({"method": method, **needed})
    options = built.computing_options() if stage == "recover" else built.options()
    assert set(kind.model_fields) - set(options) <= {"corpora"}
    if "corpora" in kind.model_fields:
        assert set(built.data_digests()) == {"corpus_0"}
