"""What a bank, a plan of mixed bits and a sparsity plan hang on: a changed default or version is another request."""

import json

import numpy as np
import pytest
from concat_cases import random_blocks

from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.planning import identity
from compression_dags.planning.identity import bank_identity, mixed_identity, table_versions
from compression_dags.planning.options import CandidateOptions
from compression_dags.provenance.artifacts import artifact_of
from compression_dags.quantization.awq import AWQ
from compression_dags.quantization.gptq import GPTQ
from compression_dags.quantization.rtn import RTN
from compression_dags.recipes import load_recipe
from compression_dags.recovery.least_squares import LeastSquares
from compression_dags.sparsity.allocation import Allocation
from compression_dags.sparsity.evidence import fresh_evidence
from compression_dags.sparsity.identity import plan_identity
from compression_dags.sparsity.pruners.sparsegpt import SparseGPT
from compression_dags.sparsity.pruners.wanda import Wanda


def options(**given):
    return CandidateOptions.model_validate(given)


def test_the_identity_is_json_and_names_every_method():
    found = bank_identity(options(sparsities=[0.5]))
    assert json.loads(json.dumps(found)) == found
    assert found["stages"]["together"]["damping"] == GPTQ.model_fields["damping"].default
    assert found["stages"]["single groups"]["target"] == "own"
    assert table_versions(options(sparsities=[0.5])).keys() == {
        "alternatives", "quantize: gptq", "recover: least-squares", "sparsify: wanda", "allocation: uniform",
    }  # fmt: skip
    plain = options(quantizer={"method": "rtn"}, depth=False)
    assert table_versions(plain).keys() == {"alternatives", "quantize: rtn"}
    assert "quantize: gptq" in table_versions(options(quantizer={"method": "awq"})), "single groups are rounded by GPTQ"


@pytest.mark.parametrize(
    ("given", "method", "touched"),
    [
        ({}, GPTQ, True),
        ({"quantizer": {"method": "awq"}}, GPTQ, True),
        ({"quantizer": {"method": "awq"}}, AWQ, True),
        ({"quantizer": {"method": "rtn"}}, GPTQ, False),
        ({"quantizer": {"method": "rtn"}}, RTN, True),
        ({}, LeastSquares, True),
        ({"recover": None}, LeastSquares, False),
        ({"sparsities": [0.5]}, Wanda, True),
        ({}, Wanda, False),
    ],
)
def test_another_version_is_another_bank(monkeypatch, given, method, touched):
    before = bank_identity(options(**given))
    monkeypatch.setattr(method, "version", "another")
    assert (bank_identity(options(**given)) != before) == touched
    monkeypatch.undo()
    assert bank_identity(options(**given)) == before
    monkeypatch.setattr(identity, "VERSION", "another")
    assert bank_identity(options(**given)) != before


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_another_default_is_another_bank(monkeypatch, method):
    asked = options(quantizer={"method": method})
    stage = RTN.model_validate({"scheme": "W4A16", "bits": 5})
    mixed = GPTQ.model_validate({"scheme": "W4A16", "bits": 5})
    before, plan, rounded = bank_identity(asked), mixed_identity(mixed), mixed_identity(stage)
    assert before["bank"]["quantizer"] == {"method": method}, "defaults are not in what was asked for"
    monkeypatch.setattr(GPTQ, "options", lambda self, old=GPTQ.options: old(self) | {"damping": 0.2})
    assert bank_identity(asked) != before and mixed_identity(mixed) != plan and mixed_identity(stage) == rounded


def test_mixed_bits_hang_on_what_is_asked():
    found = [
        mixed_identity(GPTQ.model_validate({"scheme": "W4A16", "bits": bits, "ignore": list(ignore)}))
        for bits, ignore in ((5, ["lm_head"]), (6, ["lm_head"]), (5, ["lm_head", "re:x"]))
    ]
    assert len({json.dumps(f, sort_keys=True) for f in found}) == 3
    assert "quantization_plan" in found[0]["versions"] and "alternatives" in found[0]["versions"]


def pruner(stage, **allocation):
    return stage.model_validate({"sparsity": 0.5, "allocation": allocation})


def test_sparsity_plans_hang_on_what_measures_them(monkeypatch):
    searched, given = pruner(SparseGPT, method="ramp"), pruner(SparseGPT, method="ramp", beta=0.01)
    owl = pruner(SparseGPT, method="als")
    tokens, stored = ("calibration_tokens",), ("similarity_redundancy",)
    reads = ((searched, tokens), (given, ()), (owl, tokens), (owl, stored))
    before = [plan_identity(stage, r, 2048, 0) for stage, r in reads]
    assert json.loads(json.dumps(before)) == before
    assert [("evidence" in b, "damping" in b) for b in before] == [
        (False, True), (False, False), (True, False), (False, False),
    ]  # fmt: skip
    other = [plan_identity(stage, r, 512, 3) for stage, r in reads]
    assert [a == b for a, b in zip(before, other, strict=True)] == [True, True, False, True]
    monkeypatch.setattr(SparseGPT, "version", "another")
    after = [plan_identity(stage, r, 2048, 0) for stage, r in reads]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True, True, True]
    monkeypatch.setattr("compression_dags.sparsity.identity.REDUNDANCY", "another")
    again = [plan_identity(stage, r, 2048, 0) for stage, r in reads]
    assert [a == b for a, b in zip(after, again, strict=True)] == [True, True, False, True]


def test_a_pass_of_the_plan_s_own_samples_as_the_recipe_says(tiny_model, monkeypatch, tmp_path):
    """After a merge the stored statistics do not describe the weights; the recipe's samples and seed still count."""
    from compression_dags.sparsity import evidence

    asked, real = [], evidence.profile_activations
    monkeypatch.setattr(
        evidence, "profile_activations", lambda *a, **k: asked.append((k["samples"], k["seed"])) or real(*a, **k)
    )
    (tmp_path / "r.yaml").write_text(
        "name: r\ncalibration: {samples: 64, seed: 5}\nstages:\n  - merge: {method: reverse, layers: 1}\n"
        "  - sparsify: {method: magnitude, sparsity: 0.5, allocation: {method: als}}\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.sparsify is not None and recipe.sparsity_reads == ("calibration_tokens",)
    source, blocks = Checkpoint(tiny_model("llama", layers=3)), random_blocks(rows=4)
    allocation: Allocation = recipe.sparsify.allocation
    found = [
        fresh_evidence(source, allocation, blocks, samples=samples, seed=seed)
        for samples, seed in ((recipe.calibration.samples, recipe.calibration.seed), (64, 6))
    ]
    assert asked == [(64, 5), (64, 6)]
    tables = [f.redundancy.table("layer", "in", "cka-debiased", True)[1] for f in found if f.redundancy]
    first, second = tables
    assert not np.allclose(first, second)


def test_manifests_keep_the_key_of_metadata_that_stored_ones_have(tmp_path):
    """A home that was filled before the attribute was called `metadata` is read as it is."""
    request = {"kind": "k", "version": "1", "config": {}, "inputs": {}, "numeric": {}}
    manifest = {"fingerprint": "f", "digest": "d", "request": request, "facts": {"layers": 5}}
    assert artifact_of(tmp_path, manifest).metadata == {"layers": 5}
