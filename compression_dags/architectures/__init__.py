"""What a decoder stack is: its layers, projections that share an input, norms, per-layer config fields."""

from compression_dags.architectures.catalog import KNOWN, architecture_of
from compression_dags.architectures.decoder import Architecture, Experts, ModelShape, ProjectionGroup

__all__ = ["KNOWN", "Architecture", "Experts", "ModelShape", "ProjectionGroup", "architecture_of"]
