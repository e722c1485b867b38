"""The grid: base models × recipes, both dynamic. One run is one pair."""

from dataclasses import dataclass

import dagster as dg

#: Dagster sorts the dimensions by name, so that a pair's key is `<base model>|<recipe>`.
BASE_MODELS = dg.DynamicPartitionsDefinition(name="base_model")
RECIPES = dg.DynamicPartitionsDefinition(name="recipe")
GRID = dg.MultiPartitionsDefinition({"base_model": BASE_MODELS, "recipe": RECIPES})


@dataclass(frozen=True)
class Place:
    """One partition of the grid."""

    base_model: str
    recipe: str

    @property
    def key(self) -> dg.MultiPartitionKey:
        return dg.MultiPartitionKey({"base_model": self.base_model, "recipe": self.recipe})

    @classmethod
    def of(cls, context: dg.AssetExecutionContext) -> "Place":
        """Where a run of an asset on the grid is."""
        key = context.partition_key
        assert isinstance(key, dg.MultiPartitionKey)
        return cls(key.keys_by_dimension["base_model"], key.keys_by_dimension["recipe"])

    def __str__(self) -> str:
        return f"{self.base_model}|{self.recipe}"
