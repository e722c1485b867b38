"""Layer-wise passes over the calibration tokens that change a model as they go, or score variants of it."""
