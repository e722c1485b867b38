"""Whether a drop of layers by the generic rule equals a bypass of those layers, for every family of transformers.

    python benchmarks/architectures.py                      # all families, minutes on a CPU
    python benchmarks/architectures.py llama jamba          # these
    python benchmarks/architectures.py --tiny               # three of them, seconds on a CPU

Models are tiny and random. Each is saved, layers are dropped from the files and the config, and transformers loads the
result with nothing missing, unexpected or mismatched. Its logits are compared with those of the whole model whose
dropped layers hand their input on. Where the whole model's generation is the same with and without a cache, that of the
rest must be too. One rule must hold for all tries of a family.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tiny models are helpers of the tests

import torch
import transformers
from safetensors.torch import load_file, save_file

from compression_dags.architectures.config_rules import (
    COUNTS,
    LayerFields,
    candidates,
    layer_count,
    merged,
    plain_fields,
    remapped,
    text_config,
)
from compression_dags.architectures.tracing import auto_class
from tests.support.any_models import FAMILIES, tiny_any, tiny_config

TOLERANCE = 1e-4
#: Rules tried for one family; each is a reload or more.
MOST_RULES = 40
ROWS, TOKENS, NEW = 2, 48, 6


@dataclass
class Proof:
    """What came out for one family.

    Attributes:
        tries: dropped layers → None where the drop equals the bypass, else the first reason against it.
        rule: the rule that holds, or the one that holds for most tries.
        plain: whether `rule` is the plain one.
        generates: whether the whole model generates alike with and without a cache, so that the rest was asked to.
    """

    model_type: str
    tries: dict[tuple[int, ...], str | None] = field(default_factory=dict)
    rule: LayerFields | None = None
    plain: bool = True
    generates: bool | None = None

    @property
    def found(self) -> dict[str, Any]:
        """Every role that has a field."""
        return {f.name: value for f in fields(self.rule) if (value := getattr(self.rule, f.name))} if self.rule else {}

    @property
    def passed(self) -> bool:
        return bool(self.tries) and not any(self.tries.values())

    def line(self) -> str:
        good = sum(reason is None for reason in self.tries.values())
        head = f"{self.model_type}: {good}/{len(self.tries)} {'plain' if self.plain else f'searched {self.found}'}"
        head += "" if self.generates else " (logits only)"
        return "; ".join([head, *(f"without {list(d)}: {r}" for d, r in self.tries.items() if r)])


@dataclass
class Whole:
    """A saved model in memory, with its stack of layers and its config as a dict."""

    directory: Path
    model_type: str
    model: Any
    stack: str
    config: dict[str, Any]
    fields: LayerFields
    prefix: str
    generates: bool | None = None  # None: not asked yet

    @property
    def layers(self) -> Any:
        return self.model.get_submodule(self.stack)


def drop_proof(model_type: str, work: Path) -> Proof:
    """What a drop of layer 1, of the first and last layer of each kind, and of one of each kind together, gives."""
    proof = Proof(model_type)
    whole = _whole(tiny_any(model_type, work / "whole"), model_type)
    ids = torch.randint(3, 200, (ROWS, TOKENS), generator=torch.Generator().manual_seed(5))
    before = _logits(whole.model, ids)
    tries = _tries(whole)
    bypassed = {drop: _bypassed(whole, drop, ids) for drop in tries}
    seen: list[list[dict[str, Any]]] = []
    for number, rule in enumerate(islice(candidates(whole.config, whole.fields), MOST_RULES)):
        configs = [_config_without(whole, drop, rule) for drop in tries]
        if configs in seen:
            continue
        seen.append(configs)
        reasons: dict[tuple[int, ...], str | None] = {}
        for drop, config in zip(tries, configs, strict=True):
            expected = bypassed[drop]
            if isinstance(expected, str):
                reasons[drop] = expected
            elif (expected - before).abs().max() < 10 * TOLERANCE:
                reasons[drop] = "the layers do too little for a comparison"
            else:
                reasons[drop] = _reason(whole, drop, config, expected, ids, work / "dropped")
        if not proof.tries or _good(reasons) > _good(proof.tries):
            proof.tries, proof.rule, proof.plain = reasons, rule, number == 0
        if proof.passed:
            break
    proof.generates = whole.generates
    return proof


def _good(tries: dict[tuple[int, ...], str | None]) -> int:
    return sum(reason is None for reason in tries.values())


def _whole(directory: Path, model_type: str) -> Whole:
    model = _loaded(directory, model_type)
    stack = _stack(model)
    stated = json.loads((directory / "config.json").read_text())
    config = merged(model.config.to_dict(), stated)
    path = ("text_config",) if isinstance(config.get("text_config"), dict) else ()
    text = text_config(config, path)
    count = next((n for n in COUNTS if isinstance(text.get(n), int)), "")
    fields = plain_fields(config, count, path)
    layers = len(model.get_submodule(stack))
    if layer_count(config, fields) != layers:
        raise ValueError(f"{stack} has {layers} layers, the config states {layer_count(config, fields)}")
    return Whole(directory, model_type, model, stack, config, fields, _disk_prefix(directory, stack, layers))


def _loaded(directory: Path, model_type: str) -> Any:
    kind = auto_class(tiny_config(model_type))
    model, info = kind.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    if wrong := {name: sorted(map(str, found))[:3] for name, found in info.items() if found}:
        raise ValueError(f"reload: {wrong}")
    return model.eval()


def _stack(model: Any) -> str:
    """The longest list of layers whose members a forward of text calls."""
    called: list[str] = []
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 1]
    hooks = [m[0].register_forward_hook(lambda *_, name=n: called.append(name)) for n, m in lists]
    _logits(model, torch.full((1, 8), 5))
    for hook in hooks:
        hook.remove()
    # Experts and heads of a layer lie below the stack, so their names are longer.
    depth = {n: n.count(".") for n in called}
    return min(called, key=lambda n: (bool(re.search(r"\.\d+\.", n)), -len(model.get_submodule(n)), depth[n]))


def _disk_prefix(directory: Path, stack: str, layers: int) -> str:
    """The numbered prefix of the stack's tensors in the files, which may name the stack in another way."""
    numbers: dict[str, dict[int, int]] = {}
    for name in _tensors(directory):
        if match := re.match(r"(.*?\.)(\d+)\.", name):
            found = numbers.setdefault(match[1], {})
            found[int(match[2])] = found.get(int(match[2]), 0) + 1
    fitting = [p for p, found in numbers.items() if set(found) == set(range(layers))]
    parts = set(stack.split("."))
    return max(fitting, key=lambda p: (p == f"{stack}.", len(parts & set(p.split("."))), sum(numbers[p].values())))


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(directory.glob("*.safetensors")) for n, t in load_file(file).items()}


def _kinds(whole: Whole) -> dict[str, list[int]]:
    """Layers by their parameters and by what the config's lists say of them."""
    text = text_config(whole.config, whole.fields.path)
    kinds: dict[str, list[int]] = {}
    for i, layer in enumerate(whole.layers):
        shapes = sorted((n, tuple(p.shape)) for n, p in layer.named_parameters())
        stated = [text[n][i] for n in whole.fields.lists]
        members = [i in (text[n] or ()) for n in whole.fields.index_lists]
        kinds.setdefault(repr((shapes, stated, members)), []).append(i)
    return kinds


def _tries(whole: Whole) -> list[tuple[int, ...]]:
    kinds = _kinds(whole).values()
    last = sorted(members[-1] for members in kinds)
    together = [tuple(last)] if 1 < len(last) < len(whole.layers) else []
    return list(dict.fromkeys([(1,), *((members[0],) for members in kinds), *((i,) for i in last), *together]))


def _kept(whole: Whole, drop: Sequence[int]) -> list[int]:
    return [i for i in range(len(whole.layers)) if i not in drop]


def _config_without(whole: Whole, drop: Sequence[int], rule: LayerFields) -> dict[str, Any]:
    try:
        return remapped(whole.config, _kept(whole, drop), rule)
    except Exception as error:
        return {"error": str(error)}


def _bypassed(whole: Whole, drop: Sequence[int], ids: torch.Tensor) -> torch.Tensor | str:
    """Logits with the dropped layers handing their input on; a sentence where that cannot run."""
    forwards = {i: whole.layers[i].forward for i in drop}
    try:
        for i in drop:
            whole.layers[i].forward = _identity(whole.layers[i].forward)
        return _logits(whole.model, ids)
    except Exception as error:
        return f"bypass: {type(error).__name__}: {str(error)[:120]}"
    finally:
        for i in drop:
            del whole.layers[i].forward
            assert whole.layers[i].forward == forwards[i]


def _identity(forward: Any) -> Any:
    """A forward that hands tensors on in the form in which `forward` returns them."""

    def handed_on(*args: Any, **kwargs: Any) -> Any:
        inputs = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        returned = forward(*args, **kwargs)
        if isinstance(returned, torch.Tensor):
            return hidden
        rest = [_like(value, inputs) for value in returned[1:]]
        return type(returned)([hidden, *rest])

    return handed_on


def _like(value: Any, inputs: list[torch.Tensor]) -> Any:
    """The input that a further output stands for; the output itself where there is none."""
    if isinstance(value, torch.Tensor) and len(inputs) > 1 and inputs[1].shape == value.shape:
        return inputs[1]
    return value


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def _reason(
    whole: Whole, drop: Sequence[int], config: dict[str, Any], expected: torch.Tensor, ids: torch.Tensor, target: Path
) -> str | None:
    """Why the dropped model is not the bypassed one; None where it is."""
    if "error" in config:
        return config["error"]
    try:
        _write(whole, _kept(whole, drop), config, target)
        dropped = _loaded(target, whole.model_type)
        got = _logits(dropped, ids)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    worst = (got - expected).abs().max().item()
    if worst >= TOLERANCE:
        return f"logits differ by {worst:.1e}"
    if whole.generates is None:
        whole.generates = _generation_fault(whole.model) is None
    return _generation_fault(dropped) if whole.generates else None


def _generation_fault(model: Any) -> str | None:
    """Why greedy generation with a cache is not that without; None where it is."""
    ids = torch.randint(3, 200, (1, TOKENS // 2), generator=torch.Generator().manual_seed(7))
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "output_logits": True}
    try:
        with_cache, without = (
            torch.stack(model.generate(ids, use_cache=c, return_dict_in_generate=True, **options).logits)
            for c in (True, False)
        )
    except Exception as error:
        return f"generate: {' '.join(str(error).split())[:120]}"
    worst = (with_cache - without).abs().max().item()
    return None if worst < TOLERANCE else f"generate: logits with a cache differ by {worst:.1e}"


def _write(whole: Whole, kept: Sequence[int], config: dict[str, Any], target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in whole.directory.glob("*.json"):
        if file.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copyfile(file, target / file.name)
    (target / "config.json").write_text(json.dumps(config))
    place = {i: j for j, i in enumerate(kept)}
    tensors: dict[str, torch.Tensor] = {}
    wanted = _wanted_shapes(target)
    for name, tensor in _tensors(whole.directory).items():
        match = re.match(rf"{re.escape(whole.prefix)}(\d+)(\..*)", name)
        if match is None:
            tensors[name] = _reblocked(tensor, wanted.get(name), len(whole.layers), kept)
        elif int(match[1]) in place:
            tensors[f"{whole.prefix}{place[int(match[1])]}{match[2]}"] = tensor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def _wanted_shapes(directory: Path) -> dict[str, torch.Size]:
    """Shapes of the model that the new config describes, without its weights."""
    config = transformers.AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = auto_class(config).from_config(copy.deepcopy(config))
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _reblocked(tensor: torch.Tensor, wanted: torch.Size | None, layers: int, kept: Sequence[int]) -> torch.Tensor:
    """A tensor of no layer; where it holds one block a layer, the blocks of the kept layers."""
    for axis, size in enumerate(wanted or ()):
        if len(wanted or ()) == tensor.ndim and size != tensor.shape[axis] and tensor.shape[axis] % layers == 0:
            blocks = tensor.chunk(layers, dim=axis)
            tensor = torch.cat([blocks[i] for i in kept], dim=axis).contiguous()
    return tensor


def proofs(families: Sequence[str]) -> Iterator[Proof]:
    for model_type in families:
        with tempfile.TemporaryDirectory() as work:
            try:
                yield drop_proof(model_type, Path(work))
            except Exception as error:
                sentence = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                yield Proof(model_type, {(): sentence})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--tiny", action="store_true", help="three families")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    done: list[Proof] = []
    for proof in proofs(["llama", "gemma3_text", "qwen3_moe"] if options.tiny else options.families or FAMILIES):
        print(proof.line(), flush=True)
        done.append(proof)
    plain = sum(p.passed and p.plain for p in done)
    print(f"{sum(p.passed for p in done)} of {len(done)} families passed all tries, {plain} by the plain rule")
    if options.out:
        rows = [{"model_type": p.model_type, "passed": p.passed, "plain": p.plain, "line": p.line()} for p in done]
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
