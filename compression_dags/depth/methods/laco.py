"""LaCo (Yang et al. 2024, arXiv 2402.11187): collapse layers into a layer below them, as the paper means it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compression_dags.architectures import ModelShape
from compression_dags.depth.stage import MergeStage
from compression_dags.errors import InputError

if TYPE_CHECKING:
    pass


class LaCo(MergeStage):
    """Walk down from the top; collapse layers l+1 … l+m into l where the model's last hidden states hardly turn.

    θ* = θ_l + Σ_k (θ_{l+k} − θ_l), every tensor; m = 𝒞 − 1, fewer where the stack, a layer of another kind or the
    wanted number ends it. A merge is accepted if a mean cosine over calibration sequences exceeds 𝒯. It compares the
    base model's and the candidate's last hidden states (after the final norm, flattened over a sequence's tokens). Then
    the walk goes on ℐ layers below, else one below. A walk that ends short is followed by one with a lower 𝒯.

    The released code updates θ_l in place, so that its sum telescopes to the weights of layer l+m (with l's norms): it
    drops layers. Here the sum is really taken. With one layer collapsed into l the paper's rule itself gives θ_{l+1}:
    layer l is then dropped, and the ledger says so.
    """

    version: ClassVar[str] = "1"
    measures: ClassVar[bool] = True
    implementation: ClassVar[str] = "compression_dags.depth.methods.laco_search:plan"
    method: Literal["laco"] = "laco"
    combined: int = Field(3, ge=2, description="𝒞, layers that become one in a merge; 2 is plain dropping")
    interval: int = Field(2, ge=1, description="ℐ, least distance between the starts of two merges of a walk")
    threshold: float = Field(0.95, gt=-1, le=1, description="𝒯 of the first walk: least cosine of an accepted merge")
    step: float = Field(0.05, ge=0.001, le=2, description="what 𝒯 is lowered by when a walk ends short")
    rows: int = Field(16, ge=1, description="calibration sequences compared, taken evenly from the set")

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        free = self.free_layers(shape.layers)
        most = sum(shape.kind(a) == shape.kind(b) for a, b in itertools.pairwise(free))
        if self.removed(shape.layers) > most:
            raise InputError(
                f"laco must collapse {self.removed(shape.layers)} of {shape.layers} layers, but the unprotected ones "
                f"allow {most}: only neighbours of one kind (attention type, dense or experts) become one layer; lower "
                "the ratio, or drop layers (sleb, shortgpt)"
            )
