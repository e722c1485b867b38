"""What a decoder stack is: its layers, projections that share an input, norms, per-layer config fields."""

from compression_dags.architectures.catalog import KNOWN, architecture_of
from compression_dags.architectures.decoder import Architecture, Experts, ProjectionGroup, StackFacts

__all__ = ["KNOWN", "Architecture", "Experts", "ProjectionGroup", "StackFacts", "architecture_of"]
