"""What vLLM's loader would say of a directory: clean for what is written here, a finding for everything broken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.checkpoints.serving_lint import examine, lint, require_servable, serving_fact
from compression_dags.errors import IntegrityError
from compression_dags.quantization.rtn import RTN
from models import STORIES, edit_weights, tiny

#: Asymmetric 4-bit weights have a test of their own: the MLPs of stories260k cannot be fused with their zero points.
STAGES = {
    "W8A16": RTN(scheme="W8A16"),
    "W8A16-group": RTN(scheme="W8A16", group_size=32),
    "W8A16-asymmetric": RTN(scheme="W8A16", symmetric=False),
    "W4A16": RTN(scheme="W4A16"),
    "W4A16-32": RTN(scheme="W4A16", group_size=32),
    "W3A16": RTN(scheme="W3A16", group_size=64),
    "W8A8": RTN(scheme="W8A8"),
    "W4A8": RTN(scheme="W4A8", group_size=32),
    "FP8A16": RTN(scheme="FP8A16"),
    "FP8_DYNAMIC": RTN(scheme="FP8_DYNAMIC"),
    "FP8_BLOCK": RTN(scheme="FP8_BLOCK"),
    "NVFP4A16": RTN(scheme="NVFP4A16"),
    "MXFP4A16": RTN(scheme="MXFP4A16"),
    "mixed": RTN(
        scheme="W4A16",
        group_size=32,
        ignore=("lm_head", r"re:.*layers\.1\."),
        overrides={r"re:.*layers\.0\.": {"scheme": "W8A16"}, r"re:.*layers\.2\.": {"scheme": "W8A8"}},  # pyright: ignore[reportArgumentType]
    ),
}
#: NVFP4 alone may be written in a form that loads and computes something else: see `test_one_global_scale`.
GLOBAL_SCALE = "weight_global_scale"
FIRST = "model.layers.0."
DOWN = f"{FIRST}mlp.down_proj"


def write(stage: RTN, source: Path, directory: Path) -> Path:
    # FP4 in float32 cannot be loaded by every transformers; here nothing is loaded
    stage.quantize(Checkpoint(source), directory, dtype="bfloat16")
    return directory


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Callable[[str], Path]:
    """`written("W4A16-32")`: stories260k in that scheme, made once. Read it, never write it."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = write(STAGES[name], STORIES, tmp_path_factory.mktemp(name) / "checkpoint")
        return made[name]

    return make


@pytest.fixture
def broken(written, tmp_path) -> Callable[..., Path]:
    """A copy of `written(name)` after `config(quantization_config)` and `tensors(dictionary)` changed it."""

    def make(name: str, config: Callable | None = None, tensors: Callable | None = None) -> Path:
        copy = tmp_path / "copy"
        copy.mkdir()
        for file in written(name).iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        if config:
            whole = json.loads((copy / "config.json").read_text())
            config(whole["quantization_config"])
            (copy / "config.json").write_text(json.dumps(whole))
        if tensors:
            edit_weights(copy, tensors)
        return copy

    return make


def group(config: dict[str, Any]) -> dict[str, Any]:
    return config["config_groups"]["group_0"]


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STAGES)
def test_every_scheme_is_servable(name: str, written):
    assert [line for line in lint(written(name)) if GLOBAL_SCALE not in line] == []


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3_text", "opt", "mistral"])
@pytest.mark.parametrize("stage", [STAGES["W8A8"], RTN(scheme="W4A16", group_size=32)], ids=["W8A8", "W4A16"])
def test_every_family_is_servable(family: str, stage: RTN, tiny_model, tmp_path):
    assert lint(write(stage, tiny_model(family), tmp_path)) == []


def test_sharded_files_are_read_by_their_index(broken):
    from safetensors.torch import load_file, save_file

    path = broken("W4A16-32")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {f"model-{i}.safetensors": names[i::2] for i in (0, 1)}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, path / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, held in files.items() for name in held}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert lint(path) == []


@pytest.mark.parametrize("name", ["dense", "W8A8"])
def test_a_file_that_vllm_would_read_too(name: str, broken, tiny_model, tmp_path):
    from safetensors.torch import save_file

    path = broken(name) if name != "dense" else Path(shutil.copytree(tiny_model("llama"), tmp_path / "dense"))
    save_file({"model.layers.0.mlp.up_proj": torch.ones(1)}, path / "masks.safetensors")
    (line,) = lint(path)
    assert line.startswith("masks.safetensors: vLLM reads every .safetensors file")
    (path / "sparsity").mkdir()
    (path / "masks.safetensors").rename(path / "sparsity" / "masks.safetensors")
    assert lint(path) == []


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_dense_has_no_findings(family: str, tiny_model):
    path = tiny_model(family)
    assert lint(path) == [] and serving_fact(path) == "ok"
    require_servable(path)


def test_the_check_itself_needs_no_torch(written):
    code = (
        "import sys; from compression_dags.checkpoints.serving_lint import lint; assert lint(sys.argv[1]) == []; "
        "assert not {'torch', 'transformers', 'compressed_tensors'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(written("W4A16-32"))], check=True)


# -- config.json says something that vLLM refuses ----------------------------------------------------------------------


def own_target(config: dict[str, Any]) -> None:
    """up_proj of layer 0 in four bits, its twin as before."""
    other = json.loads(json.dumps(group(config)))
    other["weights"]["num_bits"] = 4
    other["targets"] = [f"{FIRST}mlp.up_proj"]
    config["config_groups"]["group_1"] = other


def second_class(config: dict[str, Any]) -> None:
    config["config_groups"]["group_1"] = json.loads(json.dumps(group(config)))


REFUSED: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "quant_method": ("W8A8", lambda c: c.update(quant_method="awq"), "quant_method 'awq'; allowed: 'compressed-tens"),
    "sparsity": ("W8A8", lambda c: c.update(sparsity_config={"format": "dense"}), "sparsity_config .*empty or absent"),
    "kv_cache": ("W8A8", lambda c: c.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme .*allowed: null"),
    "format": ("W8A8", lambda c: c.update(format="zip"), "format 'zip'; allowed: .*pack-quantized"),
    "group format": ("W8A8", lambda c: group(c).update(format="zip"), "group_0: format 'zip'; allowed: .*int-quant"),
    "no groups": ("W8A8", lambda c: c.update(config_groups={}), "config_groups is empty"),
    "no targets": ("W8A8", lambda c: group(c).update(targets=[]), r"group_0: targets \[\]"),
    "outputs": ("W8A8", lambda c: group(c).update(output_activations={"num_bits": 8}), "output_activations .*null"),
    "fields": ("W8A8", lambda c: group(c)["weights"].update(rank=3), "group_0: fields rank; allowed: .*num_bits"),
    "bits": ("W4A16-32", lambda c: group(c)["weights"].update(num_bits=1), "group_0: int1 weights.*W2A16 to W8A16"),
    "actorder": ("W4A16-32", lambda c: group(c)["weights"].update(actorder="group"), "actorder 'group'; .*'static'"),
    "unpacked W8A16": ("W8A8", lambda c: group(c).update(input_activations=None), "int8 weights, channel.*allowed"),
    "asymmetric int8": ("W8A8", lambda c: group(c)["weights"].update(symmetric=False), "channel, asymmetric, int8 inp"),
    "asymmetric fp8": ("FP8_DYNAMIC", lambda c: group(c)["weights"].update(symmetric=False), "float8 .*asymmetric"),
    "asymmetric nvfp4": ("NVFP4A16", lambda c: group(c)["weights"].update(symmetric=False), "tensor_group.*asymmet"),
    "nvfp4 of 32": ("NVFP4A16", lambda c: group(c)["weights"].update(group_size=32), "float4 .*group_size 32"),
    "mxfp4 of 16": ("MXFP4A16", lambda c: group(c)["weights"].update(group_size=16), "float4 .*group_size 16"),
    "ignored shard": (
        "W8A8",
        lambda c: c["ignore"].append(f"{FIRST}self_attn.k_proj"),
        "qkv_proj: `ignore` names .*k_p",
    ),
    "unlike shards": ("W8A16", own_target, "gate_up_proj: gate_proj: group_0, up_proj: group_1; .*one equal scheme"),
    "unmatched": ("W8A8", lambda c: group(c).update(targets=["re:.*mlp"]), r"o_proj: in `ignore`: no, matched by no"),
    "matched twice": ("W8A8", second_class, "q_proj: .*matched by group_0, group_1; allowed: .*exactly one"),
    "head": ("W8A8", lambda c: c["ignore"].remove("lm_head"), "lm_head: quantized through the target 'Linear'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, broken):
    name, change, message = REFUSED[case]
    found = lint(broken(name, config=change))
    assert any(_search(message, line) for line in found), found


def test_group_size_that_does_not_divide(broken):
    found = examine(broken("W4A16-32", config=lambda c: group(c)["weights"].update(group_size=48))).refused
    assert f"{FIRST}self_attn.q_proj: group_size 48 of group_0 does not divide its 64 inputs" in found


def test_vllm_fuses_by_the_first_name(broken):
    """A pattern that matches the fused name, though no matrix on disk has it, decides over those of the matrices."""

    def change(config: dict[str, Any]) -> None:
        own_target(config)
        config["config_groups"]["group_1"]["targets"] = ["re:.*gate_up_proj"]

    assert any(_search("gate_up_proj: .*vLLM takes group_1 for all", line) for line in lint(broken("W8A16", change)))


def test_zero_points_that_do_not_fill_words(tmp_path):
    path = write(RTN(scheme="W4A16", group_size=32, symmetric=False), STORIES, tmp_path)
    found = examine(path)
    assert not found.damaged and len(found.refused) == 5
    assert found.refused[0].startswith(f"{FIRST}mlp.gate_up_proj: 172 rows of 4-bit zero points do not fill int32")


def test_blocks_across_fused_matrices(tmp_path):
    """Key and value have 64 rows, so that blocks of 128 rows would hold parts of both."""
    source = tiny("llama", tmp_path / "source", hidden_size=128, intermediate_size=256)
    found = examine(write(RTN(scheme="FP8_BLOCK"), source, tmp_path / "out"))
    assert not found.damaged and len(found.refused) == 4
    assert found.refused[0].startswith(f"{FIRST}self_attn.qkv_proj: 64 rows; allowed: multiples of the block's 128")


def test_one_global_scale(broken):
    """vLLM scales fused matrices by the largest of their global scales: others would come out too small."""

    def equal(tensors: dict[str, torch.Tensor], but: str = "none") -> None:
        for name in tensors:
            if name.endswith(GLOBAL_SCALE):
                tensors[name] = torch.tensor([2.0 if but in name else 1.0])

    path = broken("NVFP4A16", tensors=equal)
    assert lint(path) == []
    edit_weights(path, lambda tensors: equal(tensors, but=f"{FIRST}self_attn.k_proj"))
    assert lint(path) == [
        f"{FIRST}self_attn.qkv_proj: {GLOBAL_SCALE} 1, 2, 1: vLLM takes the largest for all; allowed: one equal value"
    ]


# -- files that contradict config.json or themselves -------------------------------------------------------------------


def put(name: str, shape: tuple[int, ...] = (64, 172), dtype: torch.dtype = torch.float32) -> Callable:
    return lambda tensors: tensors.update({name: torch.zeros(shape, dtype=dtype)})


def drop(name: str) -> Callable:
    return lambda tensors: tensors.pop(name)


DAMAGED: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "dense beside packed": (
        "W4A16-32",
        put(f"{DOWN}.weight"),
        r"down_proj\.weight is left over; group_1 allows weight_packed",
    ),
    "g_idx": ("W4A16-32", put(f"{DOWN}.weight_g_idx", (172,), torch.int32), "weight_g_idx is left over"),
    "zero points": ("W4A16-32", put(f"{DOWN}.weight_zero_point"), "weight_zero_point is left over"),
    "no weights": ("W8A8", drop(f"{DOWN}.weight"), r"down_proj\.weight is missing; group_0 needs weight, weight_scale"),
    "no codes": ("W4A16-32", drop(f"{DOWN}.weight_packed"), "weight_packed is missing"),
    "no shape": ("W4A16-32", drop(f"{DOWN}.weight_shape"), "weight_shape is missing"),
    "no scales": ("W4A16-32", drop(f"{DOWN}.weight_scale"), "weight_scale is missing"),
    "no global scale": ("NVFP4A16", drop(f"{FIRST}mlp.up_proj.{GLOBAL_SCALE}"), "weight_global_scale is missing"),
    "packed shape": (
        "W4A16-32",
        put(f"{FIRST}mlp.up_proj.weight_packed", (172, 9), torch.int32),
        r"weight_packed has the shape \[172, 9\]; group_0 needs \[172, 8\]",
    ),
    "scale shape": ("W8A8", put(f"{DOWN}.weight_scale", (64, 2)), r"weight_scale has the shape \[64, 2\].*\[64, 1\]"),
    "stated shape": (
        "W4A16-32",
        lambda tensors: tensors[f"{FIRST}mlp.up_proj.weight_shape"].copy_(torch.tensor([172, 32])),
        r"up_proj: 32 inputs; config\.json says 64",
    ),
    "dtype": ("W8A8", put(f"{DOWN}.weight"), r"down_proj\.weight is F32; group_0 allows I8"),
    "scale dtype": ("NVFP4A16", put(f"{FIRST}mlp.up_proj.weight_scale", (172, 4)), "is F32; group_0 allows F8_E4M3"),
    "ignored is packed": (
        "mixed",
        put("model.layers.1.mlp.down_proj.weight_packed"),
        "left over; ignored allows weigh",
    ),
    "ignored is gone": (
        "mixed",
        drop("model.layers.1.mlp.down_proj.weight"),
        "weight is missing; ignored needs weight",
    ),
    "unknown": ("W8A8", put("model.layers.0.mlp.gate.weight"), r"mlp\.gate\.weight: no module of a 5-layer llama"),
    "a layer too many": ("W8A8", put("model.layers.5.mlp.down_proj.weight"), "no module of a 5-layer llama"),
    "kept scales": ("W8A8", put("model.embed_tokens.weight_scale"), r"embed_tokens\.weight_scale: no module"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged(case: str, broken):
    name, change, message = DAMAGED[case]
    path = broken(name, tensors=change)
    found = examine(path)
    assert any(_search(message, line) for line in found.damaged), found
    with pytest.raises(IntegrityError):
        serving_fact(path)
    with pytest.raises(IntegrityError, match="cannot be served"):
        require_servable(path)


def test_quantized_tensors_that_no_config_announces(broken):
    path = broken("W4A16-32")
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    assert len(lint(path)) == 5 * 7 * 3
    assert "a quantized tensor, but config.json has no quantization_config" in lint(path)[0]


# -- what the pipeline records -----------------------------------------------------------------------------------------


def test_a_refused_scheme_is_recorded_and_shortened(tmp_path):
    path = write(RTN(scheme="W4A16", group_size=32, symmetric=False), STORIES, tmp_path)
    assert len(lint(path)) == 5 and serving_fact(path).count(";") == 5 + 4  # one in each line, one between two
    with pytest.raises(IntegrityError, match=r"cannot be served by vLLM: .*zero points"):
        require_servable(path)


def test_many_findings_are_counted(broken):
    fact = serving_fact(broken("W8A8", config=second_class))
    assert fact.endswith("; and 30 more") and fact.count("matched by group_0, group_1") == 5


def _search(pattern: str, text: str) -> bool:
    import re

    return re.search(pattern, text) is not None
