"""The artifacts: thin Dagster declarations, one module per stage. No maths; heavy imports inside functions."""
