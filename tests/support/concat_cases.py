"""What the tests of concatenation share: models whose layers are of one kind, tokens, evidence."""

import numpy as np
import pytest
import torch

from compression_dags.calibration.activations import profile_activations
from compression_dags.calibration.corpora import TokenBlocks
from compression_dags.calibration.streaming import DecoderStream
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.similarity.evidence import Evidence

DENSE = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "opt"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors: a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_blocks(rows=5, length=24, padded=False, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, length + 1, rows) if padded else np.full(rows, length)
    ids = rng.integers(3, 512, (rows, length)).astype(np.int32)
    ids[np.arange(length)[None, :] >= lengths[:, None]] = 0
    return TokenBlocks(ids, lengths.astype(np.int32), rows)


def alike(family, layers):
    """Config fields that make all layers of one kind, where a family mixes them."""
    return {
        "qwen2": {"use_sliding_window": False, "layer_types": ["full_attention"] * layers},
        "qwen3": {"layer_types": ["sliding_attention"] * layers},
        "gemma3_text": {"layer_types": ["sliding_attention"] * layers},
    }.get(family, {})


def checkpoint(tiny_model, family, layers=6, **config):
    return Checkpoint(tiny_model(family, layers=layers, **{**alike(family, layers), **config}))


def evidence_of(source, blocks):
    found = profile_activations(DecoderStream(source), blocks, samples=10_000)
    statistics = {f"norms.{k}": t.numpy() for k, t in found.norms.items()}
    return Evidence(
        found.block_influence.numpy(), found.angular.numpy(), found.angular_last.numpy(), statistics=statistics
    )


def members_of(source, *indices):
    return [{local: source.tensor(n) for local, n in source.layer(i).items()} for i in indices]


def every(count):
    return torch.arange(count, dtype=torch.int32)
