"""Recipes: YAML files that say how to compress a model. Read and checked without Dagster and without torch."""

from compression_dags.recipes.folders import (
    Recipes,
    find_recipe,
    load_recipes,
    own_recipes,
    pick_recipes,
    recipes_folder,
    shown_recipes,
)
from compression_dags.recipes.matrix import load_file
from compression_dags.recipes.names import BASELINE, NAME
from compression_dags.recipes.reader import load_recipe, read_recipe, recipe_of
from compression_dags.recipes.recipe import BASELINE_RECIPE, Recipe, options_digest

__all__ = [
    "BASELINE",
    "BASELINE_RECIPE",
    "NAME",
    "Recipe",
    "Recipes",
    "find_recipe",
    "load_file",
    "load_recipe",
    "load_recipes",
    "options_digest",
    "own_recipes",
    "pick_recipes",
    "read_recipe",
    "recipe_of",
    "recipes_folder",
    "shown_recipes",
]
