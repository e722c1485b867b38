"""The bank of alternatives, its exact solution, the recipe that comes out, and mixed bits on the same footing."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from concat_cases import random_blocks
from pydantic import ValidationError
from slow import by_default

from compression_dags.checkpoints.gate import check_reload
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.cli.main import main
from compression_dags.cli.plan import budgets_of, parse_budget, planning_options
from compression_dags.depth.methods.planned import Planned
from compression_dags.errors import InputError
from compression_dags.passes.scored_rows import chosen_rows
from compression_dags.passes.variant_scoring import VariantScorer
from compression_dags.planning.budget_solver import mixture_sizes, solve
from compression_dags.planning.candidate_table import measure_bank, survivors
from compression_dags.planning.candidates import Candidate, CandidateTable, label_of
from compression_dags.planning.joint_costs import counts_of, cut_sets
from compression_dags.planning.mixed import plan_schemes
from compression_dags.planning.options import CandidateOptions
from compression_dags.planning.recipe_writer import quantize_stage, recipe_of, recipe_text
from compression_dags.quantization.formats import Choice
from compression_dags.quantization.gptq import GPTQ
from compression_dags.quantization.rtn import RTN
from compression_dags.recipes import load_recipe
from compression_dags.registry import METHODS

SMALL = {"schemes": ["W8A16", "W4A16"], "group_size": 16, "rows": 4, "first_rows": 2, "length": 24}


@pytest.fixture(scope="module")
def source(tiny_model):
    return Checkpoint(tiny_model("llama", layers=4))


@pytest.fixture(scope="module")
def bank(source):
    return measure_bank(source, random_blocks(), CandidateOptions.model_validate(SMALL | {"most_removed": 0.5}))


def kl_of(source, other):
    """Mean KL of the next-token distributions of two stock models on the bank's sequences, the long way."""
    return kl_on(chosen_rows(random_blocks(), range(4)), source.path, other)


def kl_on(blocks, *paths):
    from compression_dags.checkpoints.gate import load_stock

    ids = torch.from_numpy(blocks.ids).long()
    assert blocks.lengths.min() == blocks.ids.shape[1]
    with torch.inference_mode():
        base, changed = (torch.log_softmax(load_stock(p)(ids).logits, -1) for p in paths)
    return float((base.exp() * (base - changed)).sum(-1).mean())


@pytest.mark.parametrize("quantizer", by_default(GPTQ, of=[RTN, GPTQ]))
def test_costs_are_what_the_changed_model_loses(quantizer, source, bank, tmp_path):
    from compression_dags.depth.apply import apply_plan
    from compression_dags.depth.plan import keep_only

    dropped = apply_plan(source, keep_only("x", 4, [0, 1, 3]), tmp_path / "dropped")
    found = next(a for a in bank.alternatives if a.kind == "drop" and a.layer == 2)
    blocks = random_blocks()
    assert found.rows == 4 or not found.alive
    if found.rows == 4 and len(blocks.lengths) == 4:
        assert found.cost == pytest.approx(kl_of(source, dropped.path), rel=1e-4)
    # one group at four bits, the rest ignored: the same by way of the quantizer
    only = r"re:model\.layers\.(?!1\.mlp\.down)"
    asked = {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head", only]}
    asked |= {"target": "own"} if quantizer is GPTQ else {}
    stage = quantizer.model_validate(asked)
    stage.quantize(source, tmp_path / "rounded", blocks=random_blocks(rows=4))
    options = SMALL | {"depth": False, "first_rows": 4, "quantizer": {"method": stage.method}}
    whole = measure_bank(source, random_blocks(rows=4), CandidateOptions.model_validate(options))
    (own,) = (
        a for a in whole.alternatives if (a.layer, a.group) == (1, "mlp_output") and a.choice == Choice.of("W4A16", 16)
    )
    assert own.rows == 4
    lost = kl_on(random_blocks(rows=4), source.path, tmp_path / "rounded")
    assert own.cost == pytest.approx(lost, rel=1e-3, abs=1e-9)


def test_removals_are_measured_after_recovery(source, tmp_path):
    """What the bank says of layers that go together is what the cut and recovered checkpoint loses."""
    from compression_dags.depth.apply import apply_plan
    from compression_dags.depth.plan import keep_only
    from compression_dags.recovery.least_squares import LeastSquares

    blocks, recover = random_blocks(rows=8, length=240), {"method": "least-squares", "scope": "sweep"}
    options = SMALL | {"schemes": ["W8A16"], "recover": recover, "most_removed": 0.5, "first_rows": 4, "length": 240}
    bank = measure_bank(source, blocks, CandidateOptions.model_validate(options))
    drops = [a for a in bank.alternatives if a.kind == "drop"]
    alone, made = [a for a in drops if not a.alive], [a for a in drops if a.alive]
    assert bank.recovered == recover and sorted(a.layer for a in alone) == [0, 1, 2, 3] and bank.most_removed == 2
    cheapest = tuple(sorted(a.layer for a in sorted(alone, key=lambda a: a.cost)[:2]))
    (both,) = (a for a in made if a.layers == cheapest)
    plan = keep_only("planned", 4, [i for i in range(4) if i not in cheapest])
    cut = apply_plan(source, plan, tmp_path / "cut")
    fitting, measured = (chosen_rows(blocks, range(start, 8, 2)) for start in (1, 0))
    found = LeastSquares.model_validate(recover).recover(source, cut, plan, fitting, tmp_path / "recovered")
    assert both.cost == pytest.approx(kl_on(measured, source.path, found.checkpoint.path), rel=1e-3)
    assert CandidateTable.load(saved(bank, tmp_path)) == bank
    solution = solve(bank, "parameters", cut.numel)
    recipe = recipe_of(solution, bank, source.architecture, name="n", description="", calibration={})
    assert {"recover": recover} in recipe["stages"] and solution.removed == 2
    assert len(recipe["stages"][0]["merge"]["drop"]) == 2


def saved(bank, directory):
    bank.save(directory)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", [{"method": "rtn"}, {"method": "gptq", "act_order": False}, {"method": "awq"}])
def test_a_scheme_everywhere_costs_what_the_quantizer_loses(quantizer, source, tmp_path):
    blocks, options = random_blocks(rows=8), SMALL | {"depth": False, "first_rows": 4, "quantizer": quantizer}
    bank = measure_bank(source, blocks, CandidateOptions.model_validate(options))
    fitting, measured = (chosen_rows(blocks, range(start, 8, 2)) for start in (1, 0))
    stage = METHODS["quantize"][quantizer["method"]].model_validate({**quantizer, "scheme": "W4A16", "group_size": 16})
    stage.quantize(source, tmp_path / "all", blocks=fitting)
    joint, alone = bank.together["W4A16/16"]
    assert joint == pytest.approx(kl_on(measured, source.path, tmp_path / "all"), rel=1e-3)
    assert alone == pytest.approx(sum(a.cost for a in bank.alternatives if a.label == "W4A16/16"))
    solution = solve(bank, "bits", 6.5)
    found = recipe_of(solution, bank, source.architecture, name="n", description="", calibration={})["stages"][-1]
    assert quantizer.items() <= found["quantize"].items()


def test_recovery_that_cannot_be_had(source, monkeypatch):
    """`auto` goes without; a stage that was asked for is an error."""
    few = random_blocks(rows=4)
    bank = measure_bank(source, few, CandidateOptions.model_validate(SMALL | {"first_rows": 4}))
    assert bank.recovered is None and all(a.alive for a in bank.alternatives if len(a.layers) > 1)
    asked = CandidateOptions.model_validate(SMALL | {"first_rows": 4, "recover": {"method": "least-squares"}})
    monkeypatch.setattr(VariantScorer, "measured", lambda *_: pytest.fail("measured before the check"))
    with pytest.raises(InputError, match=r"least-squares .* has .* fitting tokens and needs"):
        measure_bank(source, few, asked)
    unknown = CandidateOptions.model_validate(SMALL | {"quantizer": {"method": "rtn", "ignore": ["nothing"]}})
    with pytest.raises(InputError, match="nothing"):
        measure_bank(source, few, unknown)


def weight_bytes(checkpoint):
    """Without the headers of the files."""
    return sum(t.nbytes for t in checkpoint.tensors.values())


def test_bytes_are_exact(source, bank, tmp_path):
    made = RTN(scheme="W4A16", group_size=16).quantize(source, tmp_path).checkpoint
    four = [a for a in bank.alternatives if a.kind == "quantize" and a.choice == Choice.of("W4A16", 16)]
    assert bank.fixed_bytes + sum(a.bytes for a in four) == weight_bytes(made)
    dense = [a for a in bank.alternatives if a.kind == "quantize" and a.choice is None]
    assert bank.fixed_bytes + sum(a.bytes for a in dense) == weight_bytes(source)
    assert bank.fixed_parameters + sum(a.parameters for a in dense) == source.numel


def small_bank(seed=0):
    """Three layers of one group, costs at random: few enough to try all plans."""
    generator = torch.Generator().manual_seed(seed)
    cost = lambda: float(torch.rand((), generator=generator))  # noqa: E731
    four, eight = Choice.of("W4A16", 64), Choice.of("W8A16", 64)
    found = []
    for layer in range(3):
        for choice, size in ((None, 16000), (eight, 8250), (four, 4250)):
            found.append(Candidate("quantize", layer, "g", choice, size, 8000, cost() if choice else 0.0, 0, 4))
        found.append(Candidate("drop", layer, None, None, 0, 0, 0.5 + cost(), 0, 4, layers=(layer,)))
        if layer < 2:
            found.append(Candidate("merge", layer, None, four, 4250, 8000, 0.4 + cost(), 0, 4))
    found += [Candidate("drop", s[0], None, None, 0, 0, 1.0 + cost(), 0, 4, layers=s) for s in ((0, 1), (0, 2))]
    together = {"W4A16/64": (2.0, 1.0), "W8A16/64": (1.0, 1.0)}
    return CandidateTable(3, ("g",), 1000, 500, 24000, tuple(found), together, 100)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [8000, 12000, 20000, 30000, 60000])
def test_the_solution_is_the_best_of_all_plans(seed, budget):
    bank = small_bank(seed)
    best = math.inf
    for count in range(1, 4):
        for plan in itertools.combinations(bank.alternatives, count):
            cells = [c for a in plan for c in a.cells(bank.groups)]
            gone = sum(a.kind == "drop" for a in plan)
            size = bank.fixed_bytes + sum(a.bytes for a in plan)
            if sorted(cells) == [(i, "g") for i in range(3)] and gone <= 1 and size <= budget:
                best = min(best, sum(a.cost * (1 if a.gone else bank.scale(a.label)) for a in plan))
    found = solve(bank, "bytes", budget)
    assert found.cost == pytest.approx(best) and found.bytes <= budget


def test_a_mixture_is_taken_at_what_mixtures_keep():
    """At 6.5 bits a mixture promises less than W4 everywhere. Where mixtures were measured to cost ten times what they
    promise, one scheme everywhere is the plan; where they keep it, the mixture is."""
    bank = small_bank(1)
    kept = solve(bank, "bits", 6.5)
    assert kept.labels == {"W4A16/64", "W8A16/64"}
    same = replace(bank, mixtures=((6.25, 1.0, 1.0),))
    assert solve(same, "bits", 6.5) == kept
    dear = solve(replace(bank, mixtures=((6.25, 1.0, 10.0),)), "bits", 6.5)
    assert dear.labels == {"W4A16/64"}
    costs = [a.cost for a in bank.alternatives if a.label == "W4A16/64"]
    assert dear.cost == pytest.approx(2 * sum(costs)) and dear.cost > kept.cost
    assert mixture_sizes(bank) == [pytest.approx(math.sqrt(4.25 * 8.25))]
    wide = [replace(a, choice=Choice.of("W4A16", 128), bytes=4125) for a in bank.alternatives if a.label == "W4A16/64"]
    both = replace(bank, alternatives=(*bank.alternatives, *wide))
    assert mixture_sizes(both) == [pytest.approx(math.sqrt(4.125 * 8.25))], "two group sizes are no mixture's ends"


def test_one_scheme_in_two_group_sizes(source, tmp_path):
    """A budget between them is met by both, as the recipe's overrides say, to the byte."""
    options = SMALL | {"schemes": ["W4A16", "W4A16/32"], "depth": False, "quantizer": {"method": "rtn"}}
    bank = measure_bank(source, random_blocks(), CandidateOptions.model_validate(options))
    assert bank.uniform().keys() == {"W4A16/16", "W4A16/32"}
    solution = solve(replace(bank, mixtures=()), "bits", 5.5)
    assert solution.labels == {"W4A16/16", "W4A16/32"} and 5.1 < solution.bits <= 5.5
    asked = quantize_stage(solution, bank, source.architecture)
    assert asked is not None
    sizes = [asked["group_size"], *(own["group_size"] for own in asked["overrides"].values())]
    assert set(sizes) == {16, 32}
    made = RTN.model_validate(asked).quantize(source, tmp_path / "both").checkpoint
    assert weight_bytes(made) == solution.bytes


def test_mixtures_are_measured_as_the_recipe_makes_them(source, tmp_path):
    blocks, options = random_blocks(rows=8), SMALL | {"depth": False, "first_rows": 4, "quantizer": {"method": "gptq"}}
    bank = measure_bank(source, blocks, CandidateOptions.model_validate(options))
    assert bank.mixtures
    fitting, measured = (chosen_rows(blocks, range(start, 8, 2)) for start in (1, 0))
    bits, promised, kl = bank.mixtures[0]
    solution = solve(replace(bank, mixtures=()), "bits", bits)
    assert (solution.bits, solution.cost) == (pytest.approx(bits), pytest.approx(promised))
    asked = quantize_stage(solution, bank, source.architecture)
    GPTQ.model_validate(asked).quantize(source, tmp_path / "mixed", blocks=fitting)
    assert kl == pytest.approx(kl_on(measured, source.path, tmp_path / "mixed"), rel=1e-3)
    bank.save(tmp_path)
    assert CandidateTable.load(tmp_path) == bank
    text = recipe_text({"name": "n"}, solution, bank)
    assert f"{kl / promised:.2f} at {bits:.2f} bits" in text


def test_layers_to_cut_out_together():
    """The cheapest alone, and the cheapest block, once each."""
    blocks = {1: [3.0, 1.0, 2.0, 5.0], 2: [9.0, 4.0, 1.0]}
    assert cut_sets(4, [1, 3, 0], [1, 2], blocks.__getitem__) == [(1,), (1, 3), (2, 3)]
    assert counts_of(11, True) == [1, 2, 3, 4, 6, 8, 10, 11] and counts_of(3, False) == [1, 2, 3]


def test_budgets_that_cannot_be_met():
    with pytest.raises(InputError, match=r"900 bytes: no plan is that small\. Embeddings.* take 1,000"):
        solve(small_bank(), "bytes", 900)
    with pytest.raises(InputError, match=r"2 bits: the least that these schemes allow is 4\.25"):
        solve(small_bank(), "bits", 2)
    assert solve(small_bank(), "bits", 4.25).bits == pytest.approx(4.25)
    assert solve(small_bank(), "parameters", 9000).parameters <= 9000


def test_the_race_ends_what_is_surely_worse():
    bank = small_bank()
    a = replace(bank.alternatives[1], cost=0.5, error=0.01)  # W8A16
    b = replace(bank.alternatives[2], cost=0.1, error=0.01)  # W4A16: smaller and surely cheaper
    raced = replace(bank, alternatives=(bank.alternatives[0], a, b, *bank.alternatives[3:]))
    assert 1 not in survivors(raced) and 2 in survivors(raced)
    unsure = replace(bank, alternatives=(bank.alternatives[0], replace(a, error=0.3), b, *bank.alternatives[3:]))
    assert 1 in survivors(unsure)


def test_the_recipe_makes_what_was_promised(source, bank, tmp_path):
    """Every budget: the file is read like any other, and the checkpoint has the promised bytes to the last one."""
    least = bank.fixed_bytes + sum(
        a.bytes for a in bank.alternatives if a.kind == "quantize" and a.choice == Choice.of("W4A16", 16)
    )
    for number, budget in enumerate((weight_bytes(source) * 0.7, least * 1.05, least * 0.93)):
        solution = solve(bank, "bytes", budget)
        recipe = recipe_of(
            solution, bank, source.architecture, name=f"plan-{number}", description="d", calibration={"sequences": 5}
        )
        path = tmp_path / f"plan-{number}.yaml"
        path.write_text(recipe_text(recipe, solution, bank))
        read = load_recipe(path)
        read.check(source.shape)
        current = source
        if read.merge:
            from compression_dags.depth.apply import apply_plan

            plan, rows = read.merge.plan(source.shape, None)  # pyright: ignore[reportArgumentType]
            assert (
                sum(r.action == "drop" for r in rows) + sum(r.action == "merge" for r in rows) / 2 == solution.removed
            )
            current = apply_plan(source, plan, tmp_path / f"merged-{number}")
        assert (solution.removed > 0) == (read.merge is not None)
        if read.quantize:
            out = tmp_path / f"out-{number}"
            made = read.quantize.quantize(current, out, blocks=random_blocks())
            reference = read.quantize.reference_logits(current, rounding=made.rounding)
            assert check_reload(out, reference)["relative_logit_error"] == 0.0
            current = made.checkpoint
            assert made.bits_per_weight == pytest.approx(solution.bits, rel=1e-6) or read.quantize.ignore != (
                "lm_head",
            )
        assert weight_bytes(current) == solution.bytes <= budget
    assert solution.removed > 0, "the smallest budget should need fewer layers"


def test_mixed_bits(source, tmp_path):
    stage = GPTQ.model_validate({"scheme": "W4A16", "group_size": 16, "bits": 9.25, "candidates": ["W8A16"]})
    plan, rows = plan_schemes(stage, source, random_blocks())
    assert plan.bits <= 9.25 and len({c.scheme for c in plan.choices.values()}) == 2
    assert len(rows) == 4 * source.num_layers and all(r.value is not None for r in rows)
    for layer in range(source.num_layers):  # what engines fuse is equal
        p = f"model.layers.{layer}."
        assert len({plan.choices[f"{p}self_attn.{m}_proj"] for m in "qkv"}) == 1
        assert plan.choices[f"{p}mlp.gate_proj"] == plan.choices[f"{p}mlp.up_proj"]
    made = stage.quantize(source, tmp_path, blocks=random_blocks(), schemes=plan.choices)
    assert made.bits_per_weight == pytest.approx(plan.bits)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == 2 and config["format"] == "pack-quantized"
    logits = stage.reference_logits(source, rounding=made.rounding)
    assert check_reload(tmp_path, logits)["relative_logit_error"] == 0.0
    plan.save(tmp_path)
    assert type(plan).load(tmp_path) == plan
    with pytest.raises(InputError, match=r"bits: 9\.25 needs a plan of schemes"):
        stage.quantize(source, tmp_path / "none", blocks=random_blocks())


def test_formats_may_mix(source, tmp_path):
    stage = RTN.model_validate(
        {"scheme": "W8A8", "overrides": {r"re:.*layers\.2\.": {"scheme": "FP8_DYNAMIC"}}, "ignore": ["lm_head"]}
    )
    made = stage.quantize(source, tmp_path)
    assert made.checkpoint.raw_config["quantization_config"]["format"] == "mixed-precision"
    assert check_reload(tmp_path, stage.reference_logits(source))["relative_logit_error"] == 0.0


def test_refused_options():
    with pytest.raises(ValidationError, match="bits and overrides: give one"):
        RTN.model_validate({"scheme": "W4A16", "bits": 5, "overrides": {"lm_head": {"scheme": "W8A16"}}})
    with pytest.raises(ValidationError, match="cannot share a checkpoint"):
        RTN.model_validate({"scheme": "W8A8", "bits": 5, "candidates": ["NVFP4A16"]})
    for bad, says in (("-3", "not a positive number"), ("12QB", "not a positive"), ("0", "not a positive")):
        with pytest.raises(InputError, match=says):
            parse_budget(bad)
    assert [parse_budget(t) for t in ("120MB", "1.5GiB", "90M", "4.5", "2e6")] == [120e6, 1.5 * 2**30, 90e6, 4.5, 2e6]
    with pytest.raises(InputError, match="give a budget"):
        budgets_of((), (), ())
    with pytest.raises(InputError, match=r"schemes.*'W9A9'"):
        planning_options("W9A9", None, None, True, "gptq", "auto", None, None)
    with pytest.raises(InputError, match="schemes 'W4A16/x': a group size is a number"):
        planning_options("W4A16/x", None, None, True, "gptq", "auto", None, None)
    with pytest.raises(InputError, match="group_size 64: W8A8 fixes it"):
        planning_options("W8A8/64", None, None, True, "gptq", "auto", None, None)
    asked, _ = planning_options("W8A8, W4A16, W3A16/128", 32, None, True, "gptq", "auto", None, None)
    assert [label_of(c) for c in asked.choices()] == ["W8A8/row", "W4A16/32", "W3A16/128"]
    with pytest.raises(InputError, match=r"recover 'magic' is unknown; allowed: .*least-squares"):
        planning_options(None, None, None, True, "gptq", "magic", None, None)
    with pytest.raises(InputError, match="plan: scope: 'x'"):
        planning_options(None, None, None, True, "gptq", "{method: least-squares, scope: x}", None, None)
    for bad, says in (
        ("[1]", "is no method"),
        ("{method: gptq, bits: 4}", "bits is what plan decides"),
        ("magic", "quantizer 'magic' is unknown"),
        ("{method: gptq, damping: -1}", "plan: damping: -1"),
    ):
        with pytest.raises(InputError, match=says):
            planning_options(None, None, None, True, bad, "auto", None, None)
    assert planning_options(None, None, None, True, "rtn", "none", None, None)[0].recover is None


def test_planned_depth(source):
    stage = Planned.model_validate({"drop": [1], "fuse": [[2, 3]]})
    stage.check(source.shape)
    plan, rows = stage.plan(source.shape, None)  # pyright: ignore[reportArgumentType]
    assert [layer.sources for layer in plan.layers] == [(0,), (2, 3)]
    assert [r.action for r in rows] == ["keep", "drop", "merge", "merge"]
    for bad, says in (
        ({}, "give layers to drop"),
        ({"drop": [1], "layers": 1}, "cannot be given"),
        ({"drop": [1, 2], "fuse": [[2, 3]]}, r"\[2\] are named twice"),
        ({"fuse": [[0, 2]]}, "must be neighbours"),
    ):
        with pytest.raises(ValidationError, match=says):
            Planned.model_validate(bad)
    with pytest.raises(InputError, match="layer 9 is not among the unprotected layers 0 to 3"):
        Planned.model_validate({"drop": [9]}).check(source.shape)


def test_the_command(model, tmp_path, monkeypatch):
    """Three budgets from one bank; the second call measures nothing; the emitted recipe runs."""
    home = str(tmp_path / "home")
    common = ["plan", "-m", str(model), "--home", home, "--to", str(tmp_path / "recipes"), "--json"]
    common += ["--sequences", "4", "--length", "32", "--group-size", "16", "--schemes", "W8A16,W4A16"]
    run = CliRunner()
    first = run.invoke(main, [*common, "--bytes", "700KB", "--bits", "8"], catch_exceptions=False)
    assert first.exit_code == 0, first.output
    again = run.invoke(main, [*common, "--bits", "7"], catch_exceptions=False)
    found = json.loads(first.stdout) + json.loads(again.stdout)
    assert [f["bank"] for f in found] == ["computed", "computed", "hit"]
    assert "2 of 2 assets to compute" in first.stderr and "all 2 assets are stored" in again.stderr
    assert found[0]["bytes"] <= 700e3 and found[1]["bits_per_weight"] <= 8 and found[2]["bits_per_weight"] <= 7
    assert found[1]["predicted_kl"] <= found[2]["predicted_kl"]
    monkeypatch.setenv("COMPRESSION_DAGS_RECIPES", str(tmp_path / "recipes"))
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little cat. " * 100)
    ran = run.invoke(
        main,
        ["run", "-m", str(model), "-r", found[2]["recipe"], "--tasks", str(text), "--home", home, "--json"],
        catch_exceptions=False,
    )
    assert ran.exit_code == 0, ran.output
    written = json.loads(ran.stdout)["recipes"][found[2]["recipe"]]["bytes"]
    assert found[2]["bytes"] < written < found[2]["bytes"] + 20_000  # the file's header
    (tmp_path / "recipes" / "mine.yaml").write_text("name: mine\n")
    refused = run.invoke(main, [*common, "--bits", "7", "--name", "mine"])
    assert refused.exit_code == 2 and "was not made by plan" in refused.output


@pytest.mark.slow
def test_parameters_may_also_go_by_zeros(source, tmp_path):
    """With a budget in parameters: some layers are pruned; the recipe's checkpoint has as many non-zero weights."""
    from compression_dags.calibration.activations import profile_activations
    from compression_dags.calibration.statistics import load_statistics
    from compression_dags.calibration.streaming import DecoderStream

    options = CandidateOptions.model_validate(SMALL | {"sparsities": [0.5], "depth": False})
    with pytest.raises(InputError, match=r"sparsities \[0\.5\] need the statistics"):
        measure_bank(source, random_blocks(), options)
    profile_activations(DecoderStream(source), random_blocks()).save(tmp_path)
    bank = measure_bank(source, random_blocks(), options, statistics=load_statistics(tmp_path))
    sparse = [a for a in bank.alternatives if a.kind == "sparsify"]
    assert len(sparse) == source.num_layers and all(a.cost > 0 and a.label == "50 % zeros" for a in sparse)
    budget = source.numel - 1.5 * (source.numel - bank.fixed_parameters) / source.num_layers / 2
    solution = solve(bank, "parameters", budget)
    recipe = recipe_of(solution, bank, source.architecture, name="half", description="d", calibration={})
    (entry,) = recipe["stages"]
    assert entry["sparsify"]["allocation"]["method"] == "given"
    (tmp_path / "half.yaml").write_text(recipe_text(recipe, solution, bank))
    stage = load_recipe(tmp_path / "half.yaml").sparsify
    assert stage is not None
    from compression_dags.sparsity.allocation import SparsityEvidence

    plan, _ = stage.plan(source, SparsityEvidence(source.architecture))
    pruned = stage.sparsify(source, plan, random_blocks(), tmp_path / "pruned").checkpoint
    left = sum(int((pruned.tensor(name) != 0).sum()) for name in pruned.tensors)
    assert abs(left - solution.parameters) <= 0.002 * source.numel and left <= budget * 1.001
    from compression_dags.sparsity.allocators.given import Given
    from compression_dags.sparsity.stage import all_matrices

    with pytest.raises(InputError, match=r"come to 0\.1250 of the weights, not to 0\.5"):
        Given(layers={0: 0.5}).allocate(
            all_matrices(source),
            0.5,
            SparsityEvidence(source.architecture),
        )
