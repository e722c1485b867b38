"""A random checkpoint of any Llama shape, random tokens, and what a pass over them must compute."""

from __future__ import annotations

import argparse
import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compression_dags.calibration.corpora import TokenBlocks
from compression_dags.checkpoints.reader import INDEX, Checkpoint

WRITERS = 4  # shards written at a time


def config_of(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.hidden,
        "intermediate_size": args.inter,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv,
        "head_dim": args.hidden // args.heads,
        "vocab_size": args.vocab,
        "max_position_embeddings": max(args.length, 64),
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    }


def shapes(args: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """Local name → shape of the tensors of one layer."""
    d, wide = args.hidden, args.hidden // args.heads * args.kv
    return {
        "input_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (d, d),
        "self_attn.k_proj.weight": (wide, d),
        "self_attn.v_proj.weight": (wide, d),
        "self_attn.o_proj.weight": (d, d),
        "post_attention_layernorm.weight": (d,),
        "mlp.gate_proj.weight": (args.inter, d),
        "mlp.up_proj.weight": (args.inter, d),
        "mlp.down_proj.weight": (d, args.inter),
    }


def write_random(directory: Path, args: argparse.Namespace) -> Checkpoint:
    """A random bfloat16 checkpoint, a shard a layer: matrices N(0, 1/in), γ = 1 + N(0, 0.1²).

    Both output projections are smaller by 1/√(2 · layers), so that no layer drowns the others. Values are drawn on the
    device; at most `WRITERS` shards are in memory while they are written.
    """
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config_of(args), indent=1))
    generator = torch.Generator(args.device).manual_seed(0)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator, device=args.device, dtype=torch.bfloat16)
        if len(shape) == 1:
            return (1 + 0.1 * noise).cpu()
        writes = "o_proj" in name or "down_proj" in name
        scale = 1.0 if "embed" in name else shape[1] ** -0.5 * ((2 * args.layers) ** -0.5 if writes else 1.0)
        return (noise * scale).cpu()

    table = (args.vocab, args.hidden)
    shards: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": (args.hidden,)},
        *({f"model.layers.{i}.{k}": s for k, s in shapes(args).items()} for i in range(args.layers)),
    ]
    weight_map: dict[str, str] = {}
    written: list[Future[None]] = []
    with ThreadPoolExecutor(WRITERS) as pool:
        for number, shard in enumerate(shards):
            file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            tensors = {name: draw(name, shape) for name, shape in shard.items()}
            weight_map |= dict.fromkeys(shard, file)
            written.append(pool.submit(save_file, tensors, directory / file, {"format": "pt"}))
            del tensors
            if len(written) >= WRITERS:
                written.pop(0).result()
        for future in written:
            future.result()
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return Checkpoint(directory)


def random_tokens(args: argparse.Namespace) -> TokenBlocks:
    ids = np.random.default_rng(0).integers(3, args.vocab, (args.sequences, args.length)).astype(np.int32)
    return TokenBlocks(ids, np.full(args.sequences, args.length, dtype=np.int32), args.sequences)


def layer_flops(args: argparse.Namespace) -> float:
    """Of one layer over all calibration tokens: two a parameter and token, and causal attention's two products."""
    tokens = args.sequences * args.length
    parameters = sum(int(np.prod(s)) for s in shapes(args).values() if len(s) == 2)
    return 2.0 * parameters * tokens + 2.0 * tokens * args.length * args.hidden


def hessian_flops(args: argparse.Namespace) -> float:
    """Of one layer's Hessians over all calibration tokens: four inputs, three as wide as the model."""
    return 2.0 * args.sequences * args.length * (3 * args.hidden**2 + args.inter**2)
