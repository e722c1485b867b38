"""All allocators, told apart by `method`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from compression_dags.sparsity.allocation import Allocation
from compression_dags.sparsity.allocators.alpha import Alpha
from compression_dags.sparsity.allocators.als import ALS
from compression_dags.sparsity.allocators.dlp import DLP
from compression_dags.sparsity.allocators.given import Given
from compression_dags.sparsity.allocators.owl import OWL
from compression_dags.sparsity.allocators.ramp import Ramp
from compression_dags.sparsity.allocators.uniform import Uniform

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
