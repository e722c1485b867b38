"""Quantizers that write compressed-tensors checkpoints."""
