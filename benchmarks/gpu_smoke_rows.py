"""Rows of the GPU smoke run: what one recipe came to on two devices, and whether that is close enough."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from gpu_smoke_cases import CASES


@dataclass(frozen=True)
class Tolerance:
    """Largest relative differences: of perplexity in float32, of weights, of perplexity in the default dtype."""

    float32: float
    weights: float | None
    default: float


PLAIN, AMPLIFIED, TRAINED = Tolerance(1e-4, 1e-4, 0.1), Tolerance(2e-2, None, 0.3), Tolerance(5e-2, None, 0.3)
#: ADMM rounds the factors of its products to bfloat16 on a GPU. Set after the first result (docs/log/gpu-2026-11.md).
HALVED = Tolerance(1e-1, None, 0.3)


#: Words in the names of recipes whose method amplifies rounding.
AMPLIFIES = (
    "mka",
    "come",
    "concat",
    "least-squares",
    "wanda",
    "sparsegpt",
    "admm",
    "allocate",
    "gptq",
    "awq",
    "smooth",
)


def tolerance(recipe: str) -> Tolerance:
    """What a recipe is held to; distillation trains in bfloat16 on every GPU."""
    if "distill" in recipe:
        return TRAINED
    if "admm" in recipe:
        return HALVED
    return AMPLIFIED if recipe == "every-stage" or any(word in recipe for word in AMPLIFIES) else PLAIN


@dataclass
class Run:
    """One `run` of the command line: a model through its recipes on one device."""

    model: str
    path: Path
    device: str
    dtype: str
    home: Path
    seconds: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass
class Row:
    """One recipe on one model: what the two devices made of it."""

    model: str
    recipe: str
    passed: bool
    why: str = ""
    perplexity: float | None = None
    difference: float | None = None
    weights: float | None = None
    dtype_difference: float | None = None
    refused: str = ""


def chosen_layers(home: Path, assets: dict[str, dict[str, Any]]) -> Any:
    """The merge plan that a recipe followed, or None where it has none."""
    if (plan := assets.get("merge_plan")) is None:
        return None
    file = home / "artifacts" / "merge_plan" / plan["fingerprint"] / "plan.json"
    return json.loads(file.read_text())["layers"]


def same_choice(a: Any, b: Any) -> bool:
    """Whether two plans keep and merge the same layers; the shares of a merge may differ by rounding."""
    sources = [None if p is None else [layer["sources"] for layer in p] for p in (a, b)]
    return sources[0] == sources[1]


def perplexity(scores: dict[str, Any]) -> float:
    (task,) = scores.values()
    return float(next(value for name, value in task.items() if name.startswith("perplexity")))


def weights_difference(a: str, b: str) -> float | None:
    """‖a − b‖ / ‖a‖ over all parameters, as stock transformers loads (and dequantizes) them."""
    import torch

    from compression_dags.checkpoints.gate import load_stock

    torch.set_num_threads(1)
    first, second = (load_stock(Path(p)).state_dict() for p in (a, b))
    if {k: v.shape for k, v in first.items()} != {k: v.shape for k, v in second.items()}:
        return None
    pairs = [(first[k].double(), second[k].double()) for k in first if first[k].is_floating_point()]
    apart = sum(float((x - y).square().sum()) for x, y in pairs)
    return (apart / sum(float(x.square().sum()) for x, _ in pairs)) ** 0.5


def row_of(model: str, recipe: str, runs: list[Run], weights: float | None) -> Row:
    """A row from the runs on both devices in float32, and the one in the second device's own dtype."""
    failed = [f"{r.device} {r.dtype}: {r.failed[recipe]}" for r in runs if recipe in r.failed]
    if failed:
        return Row(model, recipe, False, "; ".join(failed))
    found = [r.found["recipes"][recipe] for r in runs]
    plans = [chosen_layers(r.home, f["assets"]) for r, f in zip(runs, found, strict=True)]
    scores = [perplexity(f["scores"]) for f in found]
    apart, own = (abs(scores[i] / scores[0] - 1) for i in (1, 2))
    allowed = tolerance(recipe)
    wrong = [key for key in ("layers", "params", "bytes") if len({f[key] for f in found}) > 1]
    wrong += ["other layers chosen"] * (not same_choice(plans[0], plans[1]))
    wrong += [f"perplexity {scores[0]:.6g} and {scores[1]:.6g}"] * (not apart <= allowed.float32)
    near = allowed.weights is None or (weights is not None and weights <= allowed.weights)
    wrong += [f"weights differ by {weights}"] * (not near)
    same = same_choice(plans[0], plans[2])
    wrong += [f"perplexity {scores[2]:.6g} in {runs[2].dtype}"] * (same and not own <= allowed.default)
    return Row(model, recipe, not wrong, ", ".join(wrong), scores[0], apart, weights, own if same else None)


def baseline_row(model: str, runs: list[Run]) -> Row:
    scores = [perplexity(r.found["baseline"]["scores"]) for r in runs if r.found]
    if len(scores) < len(runs):
        return Row(model, "baseline", False, "a run gave nothing")
    apart, own = (abs(scores[i] / scores[0] - 1) for i in (1, 2))
    passed = apart <= PLAIN.float32 and own <= PLAIN.default
    return Row(model, "baseline", passed, "" if passed else "perplexity", scores[0], apart, 0.0, own)


def refusal_row(model: str, recipe: str, answers: list[tuple[int, str]]) -> Row:
    same = len(set(answers)) == 1 and answers[0][0] == 2
    why = "" if same else "; ".join(f"exit {code}: {line}" for code, line in answers)
    return Row(model, recipe, same, why, refused=answers[0][1])


def compare(runs: dict[str, list[Run]], recipes: dict[str, list[str]], jobs: int) -> list[Row]:
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        pending = {}
        for model, group in runs.items():
            for name in recipes[model]:
                found = [r.found.get("recipes", {}).get(name) for r in group[:2]]
                if all(found):
                    pending[model, name] = pool.submit(weights_difference, *(f["checkpoint"] for f in found if f))
        weights = {key: future.result() for key, future in pending.items()}
    rows = [baseline_row(model, group) for model, group in runs.items() if recipes[model]]
    return rows + [row_of(m, n, group, weights.get((m, n))) for m, group in runs.items() for n in recipes[m]]


def table(rows: list[Row]) -> str:
    """A line a recipe, a column a model: difference of perplexity in float32 · in the default dtype."""
    models = list(dict.fromkeys(r.model for r in rows))
    names = list(dict.fromkeys(["baseline", *CASES]))
    cells = {(r.recipe, r.model): cell(r) for r in rows}
    lines = [["recipe", *models], ["---"] * (len(models) + 1)]
    lines += [[n, *(cells.get((n, m), "") for m in models)] for n in names if any((n, m) in cells for m in models)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(row: Row) -> str:
    if not row.passed:
        return "**FAILED**"
    if row.refused:
        return "refused"
    own = "other plan" if row.dtype_difference is None else f"{100 * row.dtype_difference:.1f} %"
    return f"{row.difference:.0e} · {own}"
