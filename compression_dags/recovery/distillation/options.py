"""Hierarchical distillation of merged layers (CoMe, arXiv 2510.15304, §"post-training"), then of the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from compression_dags.architectures import ModelShape
from compression_dags.calibration.corpora import check_size, corpus_digest
from compression_dags.errors import InputError
from compression_dags.recovery.stage import RecoverStage

if TYPE_CHECKING:
    pass


#: Config fields of factors between the head and the logits, which training in pieces does not apply.
_LOGIT_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier_scale", "dim_model_base")


class Distillation(RecoverStage):
    """Options of both schedules.

    Every merged layer (a new layer that stands for several original ones) is trained. It is to map the state at its
    group's entry to the base model's state at the group's exit. The group borders come from the plan. Then, with
    `logit_share` > 0, the whole student is trained on KL(base model's logits ‖ its own). Embeddings and output head are
    never trained. `tokens` counts every training token of both parts once for every pass over it.

    The calibration tokens are not used: training and held-out windows come from `corpora`, held-out ones apart.
    """

    version: ClassVar[str] = "2"
    implementation: ClassVar[str] = "compression_dags.recovery.distillation.run:recover"
    inputs: ClassVar[Literal["teacher", "student"]]

    corpora: tuple[str, ...] = Field(("c4-sample",), min_length=1, description="texts to train on, in equal shares")
    tokens: int = Field(2_000_000, ge=1, description="training tokens in all")
    logit_share: float = Field(0.75, ge=0, le=1, description="share of the tokens spent on logits")
    length: int = Field(1024, ge=8, description="tokens in a window; clipped to the model's context")
    batch_tokens: int = Field(16_384, ge=8, description="tokens in an optimizer step")
    hidden_loss: Literal["mse", "kl"] = Field(
        "mse", description="mse: squared error over ‖h‖²; kl: KL of softmax over the hidden channels (CoMe's figure)"
    )
    hidden_temperature: float = Field(1.0, gt=0, description="of kl, in units of the target's root mean square")
    hidden_lr: float = Field(5e-4, gt=0, description="peak learning rate of merged layers on hidden states")
    logit_lr: float = Field(5e-4, gt=0, description="peak learning rate on logits")
    logit_temperature: float = Field(1.0, gt=0, description="of the logit distributions")
    logit_train: Literal["merged", "layers"] = Field(
        "layers", description="what the logit part trains: merged layers alone, or all decoder layers"
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps that the learning rate rises over")
    held_windows: int = Field(32, ge=1, description="windows never trained on, for stopping and acceptance")
    checks: int = Field(8, ge=1, description="times a part is scored on the held-out windows")
    patience: int = Field(3, ge=1, description="checks without progress before a part stops")
    workers: int = Field(1, ge=1, description="processes that share the groups of distill-mp, each on its own GPU")
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _one_step(self) -> Distillation:
        if self.tokens < self.batch_tokens:
            raise ValueError(f"tokens {self.tokens} is less than one step (batch_tokens {self.batch_tokens})")
        return self

    def check(self, shape: ModelShape) -> None:
        if shape.architecture.has_experts:
            raise InputError(
                f"recover: {self.method} does not train experts ({shape.architecture.model_type}); "
                "leave the stage out for this model"
            )
        if why := _untrainable(shape):
            raise InputError(
                f"recover: {self.method} cannot train {shape.architecture.model_type}: {why}; use least-squares, or "
                "leave the stage out for this model"
            )
        for corpus in self.corpora:
            check_size(corpus, max(1, self.held_windows // len(self.corpora)) + 1, self._window(shape), "held_windows")
        if self.batch_tokens < self._window(shape):
            raise InputError(f"recover: {self.method} has batch_tokens {self.batch_tokens}, less than one window")

    def data_digests(self) -> dict[str, str]:
        return {f"corpus_{i}": corpus_digest(corpus) for i, corpus in enumerate(dict.fromkeys(self.corpora))}

    def computing_options(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"corpora"})

    def _window(self, shape: ModelShape) -> int:
        return min(self.length, int(shape.config.get("max_position_embeddings") or self.length))


def _untrainable(shape: ModelShape) -> str:
    """Why layers of a discovered model cannot be trained one by one; empty if they can."""
    architecture = shape.architecture
    if not architecture.kinds:
        return ""
    if architecture.fields is not None and architecture.fields.path:
        return "its decoder is a part of a larger model"
    if architecture.returned:
        return "its layers return more than their output"
    if scales := [n for n in _LOGIT_SCALES if shape.config.get(n) not in (None, 1, 1.0)]:
        return f"its logits are scaled after the head ({scales[0]})"
    if shared := next((name for kind in architecture.kinds for name in kind.shared), ""):
        return f"its layers share {shared}"
    for number, kind in enumerate(architecture.kinds):
        prefix = architecture.layer_prefix(architecture.kind_of.index(number))
        if missing := next((n for n, _ in kind.shapes if shape.tensors and prefix + n not in shape.tensors), ""):
            return f"{missing} has another name or form on disk"
    return ""


class DistillSP(Distillation):
    """Distil merged layers one after another, from the bottom, on the student's own states; then the logits.

    CoMe's single-process schedule. The states at a layer's entry are those of the student with the layers below
    already trained, so later layers correct what earlier ones left. A layer that does not lower the held-out
    next-token loss is put back and recorded as `reject`.
    """

    inputs: ClassVar[Literal["teacher", "student"]] = "student"
    method: Literal["distill-sp"] = "distill-sp"


class DistillMP(Distillation):
    """Distil merged layers independently of one another, on the base model's states; then the logits.

    CoMe's multi-process schedule: with the base model's state at a group's entry as input the groups are separate
    problems. One pass of the base model serves all groups of a process; `workers` > 1 shares them among processes, one
    GPU each, with the same result.
    """

    inputs: ClassVar[Literal["teacher", "student"]] = "teacher"
    method: Literal["distill-mp"] = "distill-mp"
