"""The bank of alternatives of a base model: what the budget planner solves from."""

from typing import Any

import dagster as dg

from compression_dags.assets.base_models import base_model, base_models
from compression_dags.assets.calibration import calibration_key
from compression_dags.assets.publishing import GPU_POOL, publish
from compression_dags.calibration.corpora import Calibration
from compression_dags.planning.identity import VERSION, bank_identity
from compression_dags.planning.options import CandidateOptions
from compression_dags.provenance.artifacts import DECISIONS, Artifact, Request
from compression_dags.recipes import options_digest
from compression_dags.resources.accelerator import Accelerator
from compression_dags.resources.artifact_store import ArtifactStore

NAME = "alternatives"


def build_alternatives(calibration: Calibration, options: CandidateOptions) -> dg.AssetsDefinition:
    chosen = bank_identity(options)
    ins = {"base": dg.AssetIn(base_model.key)}
    ins["tokens"] = dg.AssetIn(calibration_key(calibration, "calibration_tokens"))
    if options.sparsities:
        ins["activations"] = dg.AssetIn(calibration_key(calibration, "calibration_activations"))

    @dg.asset(
        key=calibration_key(calibration, NAME),
        partitions_def=base_models,
        group_name="planning",
        kinds={"json"},
        code_version=f"{VERSION}:{options_digest(chosen)}",
        ins=ins,
        description="What every layer could become (a scheme for each group of projections, dropped, merged with the "
        "next), the bytes of each, and KL(base ‖ changed) on calibration text. `compression-dags plan` solves a budget "
        "from it in seconds.",
        pool=GPU_POOL,
    )
    def alternatives(
        context: dg.AssetExecutionContext,
        store: ArtifactStore,
        accelerator: Accelerator,
        base: Artifact,
        tokens: Artifact,
        **activations: Artifact,
    ) -> dg.Output[Artifact]:
        inputs = {"base_model": base.digest, "calibration_tokens": tokens.digest}
        inputs |= {f"calibration_{name}": artifact.digest for name, artifact in activations.items()}

        def build(work):
            from compression_dags.calibration.corpora import load_blocks
            from compression_dags.calibration.statistics import load_statistics
            from compression_dags.checkpoints.reader import Checkpoint
            from compression_dags.planning.candidate_table import bank_decisions, measure_bank
            from compression_dags.provenance.decisions import write_decisions
            from compression_dags.stage import bar

            source, blocks = Checkpoint(base.checkpoint), load_blocks(tokens.path / "tokens.safetensors")
            found = load_statistics(activations["activations"].path) if activations else None
            with accelerator.lease() as device:
                on: dict[str, Any] = {"device": device.name, "dtype": device.dtype, "statistics": found}
                bank = measure_bank(source, blocks, options, **on, progress=bar)
            bank.save(work.out)
            write_decisions(bank_decisions(bank), work.out / DECISIONS)
            alive = sum(a.alive for a in bank.alternatives)
            return {"alternatives": len(bank.alternatives), "alive": alive, "tokens": bank.tokens}

        request = Request(NAME, VERSION, chosen, inputs, accelerator.numeric)
        return publish(context, store, request, build)

    return alternatives
