"""What shapes and sizes rule out is refused before anything is computed, with what is allowed."""

import math

import pytest
from click.testing import CliRunner
from concat_cases import random_blocks
from pydantic import ValidationError

from compression_dags.architectures import ModelShape
from compression_dags.calibration.corpora import Calibration
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.cli.main import main
from compression_dags.cli.plan import budgets_of, parse_budget, planning_options
from compression_dags.errors import InputError
from compression_dags.evaluation.tasks import HarnessTask, PerplexityTask
from compression_dags.planning.bounds import Measure, check_plan, limits_of
from compression_dags.planning.budget_solver import solve
from compression_dags.planning.candidate_table import measure_bank
from compression_dags.planning.candidates import Shapes, candidates, empty_table
from compression_dags.planning.mixed import plan_schemes
from compression_dags.planning.options import CandidateOptions
from compression_dags.planning.recipe_writer import quantize_stage
from compression_dags.quantization.rtn import RTN
from compression_dags.recipes import load_recipe
from compression_dags.registry import METHODS
from compression_dags.sparsity.allocators import ALLOCATORS

SMALL = {"schemes": ["W8A16", "W4A16"], "group_size": 16, "rows": 2, "first_rows": 2, "length": 24, "recover": None}
SMALL |= {"quantizer": {"method": "rtn"}}


def costed(source, options):
    """A bank whose costs were not measured: every alternative at 1, what is left as it is at 0."""
    from dataclasses import replace

    from compression_dags.planning.candidates import Candidate, removable

    bank = empty_table(source, candidates(source, options))
    most = removable(options, bank.layers)
    found = [replace(a, cost=0.0 if a.is_dense else 1.0) for a in bank.alternatives]
    if most:
        found.append(Candidate("drop", 0, None, None, 0, 0, 9.0, layers=tuple(range(most))))
    return replace(bank, alternatives=tuple(found))


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"depth": False},
        {"units": "layer"},
        {"sparsities": [0.25, 0.5], "most_removed": 0.6},
        {"schemes": ["NVFP4A16"], "depth": False},
        {"schemes": ["W4A16/32"], "quantizer": {"method": "rtn", "ignore": ["lm_head", r"re:.*\.1\..*"]}},
    ],
)
def test_the_least_by_shapes_is_the_least_of_the_solver(tiny_model, family, more):
    source, options = Checkpoint(tiny_model(family, layers=4)), CandidateOptions.model_validate(SMALL | more)
    bank = costed(source, options)
    for measure, found in limits_of(Shapes.of(source), options).items():
        if found.least == found.most:
            assert measure == "parameters"
            continue
        solution = solve(bank, measure, found.least * (1 + 1e-9))
        size = {"bytes": solution.bytes, "parameters": solution.parameters, "bits": solution.bits}[measure]
        assert size == pytest.approx(found.least, rel=1e-6)
        below = found.least * (1 - 1e-6) - (measure != "bits")
        with pytest.raises(InputError, match="least"):
            solve(bank, measure, below)
        with pytest.raises(InputError, match="least"):
            found.check(below)
        found.check(found.least)
        with pytest.raises(InputError, match="lies below"):
            found.check(found.most)
        assert solve(bank, measure, found.most).cost == 0, "the model fits as it is"


def test_the_shown_least_is_allowed(stories):
    source = Checkpoint(stories)
    found = limits_of(Shapes.of(source), CandidateOptions.model_validate({}))["bits"]
    with pytest.raises(InputError) as error:
        found.check(3.5)
    shown = float(str(error.value).split("allow is ")[1].split(";")[0])
    assert shown == pytest.approx(4.6582) and shown >= found.least
    found.check(shown)


def test_a_measured_bank_meets_what_its_shapes_promise(tiny_model):
    source = Checkpoint(tiny_model("llama", layers=3))
    options = CandidateOptions.model_validate(SMALL | {"schemes": ["W8A16"]})
    bank = measure_bank(source, random_blocks(rows=4), options)
    found = limits_of(Shapes.of(source), options)
    assert bank.most_removed == found["bytes"].gone == 1
    assert solve(bank, "bytes", found["bytes"].least).bytes == found["bytes"].least
    assert solve(bank, "parameters", found["parameters"].least).removed == 1


def test_what_the_quantizer_ignores_stays_as_it_is(tiny_model, tmp_path):
    """In the bank, in mixed bits, and in the recipe: the promised bytes are those on disk."""
    source, kept = Checkpoint(tiny_model("llama", layers=3)), ["lm_head", r"re:model\.layers\.0\."]
    asked = SMALL | {"depth": False, "quantizer": {"method": "rtn", "ignore": kept}}
    bank = measure_bank(source, random_blocks(rows=4), CandidateOptions.model_validate(asked))
    assert {a.layer for a in bank.alternatives if a.choice is not None} == {1, 2}
    solution = solve(bank, "bits", 15)
    stage = RTN.model_validate(quantize_stage(solution, bank, source.architecture))
    made = stage.quantize(source, tmp_path / "made").checkpoint
    assert sum(t.nbytes for t in made.tensors.values()) == solution.bytes
    mixed = RTN.model_validate({"scheme": "W4A16", "group_size": 16, "bits": 15, "ignore": kept, "candidates": []})
    plan, _ = plan_schemes(mixed, source, random_blocks(rows=4))
    assert plan.bits <= 15 and {n.split(".")[2] for n in plan.choices} == {"1", "2"}


@pytest.mark.parametrize(
    ("budget", "options", "says"),
    [
        (["--bytes", "1"], [], r"1 bytes: no plan is that small.* is the least; the model as it is has 1,040,128"),
        (["--bytes", "2MB"], [], "2,000,000 bytes: the model has 1,040,128 as it is"),
        (["--bits", "99"], [], "99 bits: the model has 32 as it is; a budget lies below that, and is 4.6582"),
        (["--bits", "5"], ["--schemes", "W8A16"], "5 bits: the least that these schemes allow is 8.4436"),
        (["--bits", "16", "--bytes", "700KB", "--bits", "3"], [], "3 bits: the least"),
        (["--params", "9K"], [], "9,000 parameters: no plan is that small"),
        (["--params", "7B"], [], "7,000,000,000 parameters: the model has 260,032 as it is"),
        (["--params", "200K"], ["--no-depth"], "nothing that may be chosen takes any away; allow depth, or give spars"),
        (["--params", "1GB"], [], "budget '1GB' is not a positive number with K, M or B"),
        (["--bytes", "1e400"], [], "budget '1e400' is not a positive number"),
        (["--bits", "nan"], [], "budget 'nan'"),
        (["--bits", "5"], ["--schemes", "W8A8,NVFP4A16"], "cannot share a checkpoint"),
        (["--bits", "8"], ["--quantizer", "{method: gptq, ignore: [nothing]}"], "'nothing' names no module"),
        (
            ["--bytes", "700KB"],
            ["--recover", "{method: least-squares}", "--sequences", "2"],
            "fitting tokens and needs",
        ),
        (["--bytes", "700KB", "--bytes", "700.0000001KB"], [], "two budgets would both be written"),
    ],
)
def test_plan_refuses_before_it_measures(stories, tmp_path, monkeypatch, budget, options, says):
    monkeypatch.setattr("compression_dags.cli.run.execute", lambda *_: pytest.fail("computed before the check"))
    command = ["plan", "-m", str(stories), "--home", str(tmp_path / "home"), "--to", str(tmp_path / "to")]
    done = CliRunner().invoke(main, [*command, *budget, *options])
    assert done.exit_code == 2, done.output
    import re

    assert re.search(says, done.output) and done.output.count("error: ") == 1
    assert not (tmp_path / "to").exists()


def test_a_file_of_one_s_own_is_not_measured_for(stories, tmp_path, monkeypatch):
    monkeypatch.setattr("compression_dags.cli.run.execute", lambda *_: pytest.fail("computed before the check"))
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    command = ["plan", "-m", str(stories), "--home", str(tmp_path / "home"), "--to", str(tmp_path), "--bits", "8"]
    done = CliRunner().invoke(main, [*command, "--name", "mine"])
    assert done.exit_code == 2 and "was not made by plan" in done.output


def test_units_belong_to_measures():
    assert parse_budget("1.5 GiB") == 1.5 * 2**30 and parse_budget("7B", "parameters") == 7e9
    assert budgets_of(("9MB", "9000KB"), (), ("4.5",)) == [("bytes", 9e6), ("bits", 4.5)]
    wrong: tuple[tuple[str, Measure], ...] = (
        ("4.5GB", "bits"), ("1_", "bytes"), ("١", "bytes"), ("-1", "bits"), ("1e999", "parameters"),
    )  # fmt: skip
    for text, measure in wrong:
        with pytest.raises(InputError, match="is not a positive number"):
            parse_budget(text, measure)


def test_schemes_that_are_given_twice_count_once():
    options, _ = planning_options("W4A16,W4A16/32,W4A16", 32, None, True, "rtn", "none", None, None)
    assert len(options.choices()) == 1


MERGE = "  - merge: {{method: {0}, {1}}}\n"
RECIPES = {
    "mixed bits": ("  - quantize: {method: gptq, scheme: W4A16, bits: 3.5}", "3.5 bits: the least .* 4.6582.*W3A16"),
    "bits after depth": (
        "  - merge: {method: reverse, layers: 2}\n  - quantize: {method: rtn, scheme: W4A16, bits: 4.2}",
        "4.2 bits: the least",
    ),
    "no layer": ("  - merge: {method: shortgpt, ratio: 0.05}", "removes none; the least is ratio 0.1"),
    "all layers": ("  - merge: {method: reverse, layers: 5}", "removes 5 of 5 layers"),
    "protected": ("  - merge: {method: sleb, layers: 3, protect_first: 2, protect_last: 2}", "only 1 are unprotected"),
    "groups of two": (
        "  - merge: {method: weighted-sum, layers: 2, largest_group: 2}",
        "at most 1 can be merged away: groups of at most 2",
    ),
    "pairs": ("  - merge: {method: mka, layers: 3}", "at most 2 can be merged away"),
    "mka's tokens": (
        "  - merge: {method: mka, layers: 1}\ncalibration: {sequences: 4, length: 64}",
        "mka has 192 fitting tokens and needs 640",
    ),
    "heads": ("  - merge: {method: concat, layers: 1, largest_group: 9}", "KV head"),
    "N:M": ("  - sparsify: {method: wanda, pattern: '4:8'}", "does not divide the intermediate size 172"),
    "sweep": ("  - sparsify: {method: sparsegpt, pattern: '2:4', block: 6}", "not a multiple of the 4"),
    "bounds": (
        "  - sparsify: {method: wanda, sparsity: 0.5, allocation: {method: als, bounds: [0.6, 0.9]}}",
        "outside the bounds 0.6 to 0.9",
    ),
    "too sparse": ("  - sparsify: {method: wanda, sparsity: 0.995, allocation: {method: owl}}", "more than 0.99"),
    "steep": (
        "  - sparsify: {method: wanda, sparsity: 0.5, allocation: {method: ramp, beta: 0.5}}",
        "beta 0.5 over 5 layers is a rise of 2; .*room for 0.98",
    ),
    "no rise": (
        "  - sparsify: {method: wanda, sparsity: 0.98, allocation: {method: ramp, least_rise: 0.2}}",
        "no rise between",
    ),
    "candidates": (
        "  - sparsify: {method: wanda, sparsity: 0.5, allocation: {method: ramp}}\ncalibration: {sequences: 1}",
        "scores candidates on sequences kept apart and needs 2",
    ),
    "no such layer": (
        "  - sparsify: {method: magnitude, sparsity: 0.1, allocation: {method: given, layers: {5: 0.5}}}",
        "there is no layer 5; the model has 5",
    ),
    "given of another mean": (
        "  - sparsify: {method: magnitude, sparsity: 0.5, allocation: {method: given, layers: {1: 0.5}}}",
        "come to 0.1000 of the weights, not to 0.5",
    ),
    "given, of layers that went": (
        "  - merge: {method: reverse, layers: 1}\n"
        "  - sparsify: {method: magnitude, sparsity: 0.125, allocation: {method: given, layers: {4: 0.5}}}",
        "there is no layer 4; the model has 4",
    ),
    "overrides of layers that went": (
        "  - merge: {method: reverse, layers: 1}\n  - quantize: {method: rtn, scheme: W8A16, "
        "overrides: {'re:model\\.layers\\.4\\.': {scheme: W4A16}}}",
        "names no module",
    ),
    "corpus": (
        "  - merge: {method: shortgpt, layers: 1}\ncalibration: {sequences: 100000}",
        "has 4,316,385 bytes and cannot give 100,000 × 512",
    ),
    "held-out windows": (
        "  - merge: {method: reverse, layers: 1}\n  - recover: {method: distill-sp, held_windows: 100000}",
        "cannot give 100,001",
    ),
    "fitting tokens": (
        "  - merge: {method: reverse, layers: 1}\n  - recover: {method: least-squares}\ncalibration: {sequences: 2, "
        "length: 64}",
        "needs 640",
    ),
    "one sequence": (
        "  - merge: {method: reverse, layers: 1}\n  - recover: {method: linear-patch}\ncalibration: {sequences: 1}",
        "needs 2 calibration sequences",
    ),
    "refused group": (
        "  - quantize: {method: rtn, scheme: W4A16, group_size: 128, fallback: refuse}",
        "group size 128 of W4A16 does not divide",
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipes_that_cannot_work_on_a_model(stories, tmp_path, case):
    stages, says = RECIPES[case]
    (tmp_path / "r.yaml").write_text(f"name: r\nstages:\n{stages}\n")
    recipe = load_recipe(tmp_path / "r.yaml")
    with pytest.raises(InputError, match=rf"recipe r: .*{says}"):
        recipe.check(Checkpoint(stories).stated_shape)


def test_facts_after_depth_went(tiny_model):
    shape = Checkpoint(tiny_model("llama", layers=4)).stated_shape
    shorter = shape.shortened(3)
    assert shorter.layers == 3 and len(shorter.tensors) < len(shape.tensors)
    mixed = Checkpoint(tiny_model("qwen3", layers=4)).shape
    assert mixed.shortened(3) is mixed, "which kinds stay is not known"
    assert ModelShape(shape.architecture, shape.config).tensors == {}


GIVEN = {"merge": {"ratio": 0.2}, "recover": {}, "sparsify": {"sparsity": 0.5}, "quantize": {"scheme": "W4A16"}}
OPTIONS = [
    *((m, {**GIVEN[kind], "method": name}) for kind, group in METHODS.items() for name, m in group.items()),
    *((m, {"method": name}) for name, m in ALLOCATORS.items()),
    (Calibration, {}),
    (CandidateOptions, {}),
    (PerplexityTask, {"name": "a", "file": "x.txt"}),
    (HarnessTask, {"name": "a"}),
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300, 10**400, 1e-320])
def test_no_option_takes_numbers_that_nothing_computes_with(value):
    tried = 0
    for model, given in OPTIONS:
        for name in model.model_fields:
            for wrapped in (value, [value], [0.1, value], {0: value}):
                tried += 1
                rest = {
                    k: v for k, v in given.items() if (name, k) not in {("layers", "ratio"), ("pattern", "sparsity")}
                }
                with pytest.raises((ValidationError, InputError)):
                    model.model_validate({**rest, name: wrapped})
    assert tried > 500


def test_yes_is_no_number():
    for model, given in OPTIONS:
        for name, field in model.model_fields.items():
            if field.annotation in (int, float, int | None, float | None):
                with pytest.raises((ValidationError, InputError), match=r"must be a number|Field required"):
                    model.model_validate({**given, name: True})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "als", "granularity": 0.003}, "does not divide 1"),
        ({"method": "given", "layers": {-1: 0.5}}, "layers count from 0"),
        ({"method": "given", "layers": {0: 1.0}}, r"shares lie in \[0, 1\)"),
    ],
)
def test_allocations_that_no_model_has(options, says):
    with pytest.raises((ValidationError, InputError), match=says):
        ALLOCATORS[options["method"]].model_validate(options).check(0.5)
    with pytest.raises(ValidationError, match="greater than 0"):
        METHODS["merge"]["mka"].model_validate({"ratio": 0.2, "alphas": [0.0]})


def test_a_plan_s_limits_follow_its_options(stories):
    source = Checkpoint(stories)
    options, calibration = planning_options(None, None, None, True, "rtn", "none", None, None)
    check_plan(source, options, calibration, [("bytes", 700e3), ("bits", 5.0), ("parameters", 230e3)])
    with pytest.raises(InputError, match="no layer removed"):
        check_plan(source, options.model_copy(update={"depth": False}), calibration, [("bytes", 240e3)])


def test_a_model_from_the_hub_is_checked_as_soon_as_it_is_here(stories, tmp_path, monkeypatch):
    """Imported first, and nothing else is computed for what cannot work."""

    cached = tmp_path / "cache" / "models--tiny--stories" / "snapshots" / ("0" * 40)
    cached.parent.mkdir(parents=True)
    cached.symlink_to(stories)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("compression_dags.cli.run.execute", lambda *_: pytest.fail("something is computed"))
    monkeypatch.setenv("COMPRESSION_DAGS_RECIPES", str(tmp_path))
    (tmp_path / "r.yaml").write_text("name: r\nstages:\n  - quantize: {method: gptq, scheme: W4A16, bits: 3.5}\n")
    common = ["-m", "tiny/stories@" + "0" * 40, "--home", str(tmp_path / "home")]
    ran = CliRunner().invoke(main, ["run", *common, "-r", "r"])
    planned = CliRunner().invoke(main, ["plan", *common, "--bits", "3.5"])
    for done in (ran, planned):
        assert done.exit_code == 2 and "3.5 bits: the least that these schemes allow is 4.6582" in done.output
    assert [p.name for p in (tmp_path / "home" / "artifacts").iterdir()] == ["base_model"]
