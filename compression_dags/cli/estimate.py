"""The line before a run: what it will take. It never fails a run, and costs a few hundredths of a second."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compression_dags.estimate import Estimate, Model, Step, estimate, read_past

if TYPE_CHECKING:
    import dagster as dg

    from compression_dags.definitions import Settings
    from compression_dags.evaluation.tasks import Task

logger = logging.getLogger("compression_dags")
_BLOCKS = re.compile(r"_(\d+)x(\d+)(?:_|$)")
#: Characters a token, of a text whose tokenizer is not asked.
CHARACTERS = 3.5


def announce(definitions: dg.Definitions, slug: str, keys: Sequence[dg.AssetKey], settings: Settings) -> None:
    """Say what computing these assets of a base model will take; nothing if that cannot be known."""
    try:
        found = foresee(definitions, slug, keys, settings)
    except Exception:  # an estimate is a courtesy: whatever is odd here must not stop the run
        logger.debug("no estimate", exc_info=True)
        return
    if found:
        logger.info("%s", found.line())


def foresee(definitions: dg.Definitions, slug: str, keys: Sequence[dg.AssetKey], settings: Settings) -> Estimate | None:
    """The estimate; None for a model whose size is not known before it is imported."""
    from compression_dags.definitions import evaluation_book
    from compression_dags.recipes import recipes_folder
    from compression_dags.resources.accelerator import Accelerator

    model, context = _model(slug, settings)
    if model is None:
        return None
    specs = {spec.key: spec for asset in definitions.assets or () for spec in getattr(asset, "specs", ())}
    device = Accelerator(home=str(settings.home), device=settings.device, dtype=settings.dtype).kind
    stored: dict[Any, bool] = {}
    tasks = evaluation_book(recipes_folder()).tasks
    steps = [_step(specs[key], context, tasks, _stored(key, specs, set(keys), slug, settings, stored)) for key in keys]
    past = read_past(settings.home, [s.kind for s in steps if not s.stored], device, model.parameters)
    return estimate(model, steps, device, past)


def _model(slug: str, settings: Settings) -> tuple[Model | None, int]:
    """Size and context of a base model, from its headers where it lies."""
    from compression_dags.checkpoints.reader import Checkpoint
    from compression_dags.resources.model_hub import ModelHub

    stored = _manifest(settings, ("base_model",), slug)
    source = ModelHub(home=str(settings.home)).registered().get(slug)
    if stored:
        folder = settings.home / "artifacts" / "base_model" / stored["fingerprint"] / "checkpoint"
    elif source and source.kind in {"embedded", "directory"}:
        folder = source.location
    else:
        return None, 0
    found = Checkpoint(folder)
    context = int(found.raw_config.get("max_position_embeddings") or 2048)
    return Model(found.numel, found.num_layers, found.nbytes), context


def _stored(key, specs, keys, slug: str, settings: Settings, known: dict[Any, bool]) -> bool:
    """Whether an asset was made by the present version and options, and so was everything that it is made of."""
    if key not in known:
        known[key] = False  # until it is known; the graph has no circles
        spec, manifest = specs[key], _manifest(settings, key.path, slug)
        above = [d.asset_key for d in spec.deps if d.asset_key in specs and d.asset_key in keys]
        known[key] = (
            manifest is not None
            and _as_declared(spec.code_version, manifest["request"])
            and all(_stored(k, specs, keys, slug, settings, known) for k in above)
        )
    return known[key]


def _as_declared(code_version: str | None, request: dict[str, Any]) -> bool:
    """Whether a stored request is of the version, and of the options, that an asset declares now."""
    from compression_dags.recipes import options_digest

    version, _, digest = (code_version or "").rpartition(":")
    return not version or (request["version"] == version and options_digest(request["config"]) == digest)


def _manifest(settings: Settings, path: Sequence[str], slug: str) -> dict[str, Any] | None:
    """The manifest of what an asset last was, without looking at its files."""
    try:
        handle = json.loads(settings.home.joinpath("handles", *path, f"{slug}.json").read_text())
        file = settings.home / "artifacts" / handle["kind"] / handle["fingerprint"] / "manifest.json"
        return json.loads(file.read_text())
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _step(spec: dg.AssetSpec, context: int, tasks: Mapping[str, Task], stored: bool) -> Step:
    name = spec.key.path[-1]
    kind = "evaluation" if name.startswith("eval_") else re.sub(r"^recovered_weights_\d+$", "recovered_weights", name)
    tokens = _text_tokens(tasks.get(name.removeprefix("eval_")), context) if kind == "evaluation" else 0
    for key in [spec.key, *(d.asset_key for d in spec.deps)]:
        if (blocks := _BLOCKS.search(key.path[0])) and (key == spec.key or key.path[-1] == "calibration_tokens"):
            tokens = int(blocks[1]) * min(int(blocks[2]), context)
    return Step("/".join(spec.key.path), kind, spec.tags.get("method", ""), tokens, stored)


def _text_tokens(task: Task | None, context: int) -> int:
    """Tokens of a perplexity task; of lm-eval's tasks some hundred thousand."""
    from compression_dags.evaluation.tasks import PerplexityTask

    if not isinstance(task, PerplexityTask):
        return 200_000
    whole = int(task.path.stat().st_size / CHARACTERS)
    return min(whole, (task.max_windows or whole) * min(task.window, context))
