"""All allocators, told apart by `method`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from compression_dags.sparsity.allocate_alpha import Alpha
from compression_dags.sparsity.allocate_als import ALS
from compression_dags.sparsity.allocate_dlp import DLP
from compression_dags.sparsity.allocate_given import Given
from compression_dags.sparsity.allocate_owl import OWL
from compression_dags.sparsity.allocate_ramp import Ramp
from compression_dags.sparsity.allocate_uniform import Uniform
from compression_dags.sparsity.allocation import Allocation

AnyAllocation = Annotated[Uniform | ALS | OWL | DLP | Alpha | Ramp | Given, Field(discriminator="method")]
ALLOCATORS: dict[str, type[Allocation]] = {
    "uniform": Uniform,
    "als": ALS,
    "owl": OWL,
    "dlp": DLP,
    "alpha": Alpha,
    "ramp": Ramp,
    "given": Given,
}
