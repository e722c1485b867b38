"""Older compressed-tensors read what the installed one wrote: equal logits, or a refusal that is known.

Needs them unpacked, `$COMPRESSION_DAGS_READERS/<version>/`: `./run test` sees to it. Nothing here downloads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.quantization.rtn import RTN
from models import tiny

VARIABLE = "COMPRESSION_DAGS_READERS"
#: vLLM 0.33 pins 0.17.0, llm-compressor 0.13 and 0.14 need 0.18.0 and 0.19.0.
VERSIONS = ("0.17.0", "0.18.0", "0.19.0")
STAGES = {
    "W8A16": RTN(scheme="W8A16"),
    "W8A16-asymmetric": RTN(scheme="W8A16", symmetric=False),
    "W4A16": RTN(scheme="W4A16"),
    "W4A16-32": RTN(scheme="W4A16", group_size=32),
    "W4A16-asymmetric": RTN(scheme="W4A16", group_size=32, symmetric=False),
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
#: (version, scheme) → how it stops. None of these computes something else in silence.
REFUSES = {
    ("0.17.0", "W3A16"): "ignore_mismatched_sizes",  # before 0.18 3-bit codes did not lie across words
}
#: Arguments: the folder of checkpoints, where the logits go. Prints the version and the errors as JSON.
READ = """
import json, sys
from importlib.metadata import version
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
ids = (torch.arange(64).reshape(2, 32) * 7919 + 11) % 512
logits, errors = {}, {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        with torch.inference_mode():
            model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
            assert not any(info.values()), info
            logits[path.name] = model.eval()(ids).logits
    except Exception as error:
        errors[path.name] = f"{type(error).__name__}: {error}"
save_file(logits, sys.argv[2])
print(json.dumps({"version": version("compressed-tensors"), "errors": errors}))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A random Llama in every scheme.

    Its matrices have two blocks of 128 inputs or more: before 0.19 a single one was taken for one scale a row.
    """
    root = tmp_path_factory.mktemp("readers")
    shape = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512}
    source = tiny("llama", root / "source", **shape, dtype="float16")
    for name, stage in STAGES.items():
        stage.quantize(Checkpoint(source), root / "written" / name, dtype="bfloat16")
    return root / "written"


@pytest.fixture(scope="module")
def read(checkpoints, tmp_path_factory):
    """`read(version)`: scheme → logits of that version (None: the installed one), and scheme → error."""
    from safetensors.torch import load_file

    done: dict[str | None, tuple[dict, dict]] = {}

    def run(version: str | None) -> tuple[dict, dict]:
        if version not in done:
            logits = tmp_path_factory.mktemp("logits") / "logits.safetensors"
            first = {"PYTHONPATH": str(folder_of(version))} if version else {}
            command = [sys.executable, "-c", READ, str(checkpoints), str(logits)]
            out = subprocess.run(
                command, env=os.environ | first, capture_output=True, text=True, check=True, timeout=600
            )
            said = json.loads(out.stdout.splitlines()[-1])
            assert version in (None, said["version"])
            done[version] = load_file(logits), said["errors"]
        return done[version]

    return run


def folder_of(version: str) -> Path:
    return Path(os.environ.get(VARIABLE, "")) / version


def skip_reason(version: str) -> str | None:
    if not os.environ.get(VARIABLE):
        return f"{VARIABLE} names no folder with compressed-tensors {version}"
    if not (folder_of(version) / "compressed_tensors").is_dir():
        return f"{folder_of(version)} holds no unpacked compressed-tensors"
    return None


@pytest.mark.slow
@pytest.mark.parametrize("scheme", STAGES)
@pytest.mark.parametrize("version", VERSIONS)
def test_equal_logits_in_another_version(version: str, scheme: str, request):
    import torch

    if reason := skip_reason(version):
        pytest.skip(reason)
    read = request.getfixturevalue("read")  # not a parameter: skipped tests must not write checkpoints
    (installed, errors), (logits, other_errors) = read(None), read(version)
    assert scheme not in errors
    if known := REFUSES.get((version, scheme)):
        assert known in other_errors[scheme]
        return
    assert scheme not in other_errors, other_errors[scheme]
    assert torch.equal(logits[scheme], installed[scheme])
