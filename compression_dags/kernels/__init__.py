"""Triton kernels, each with a plain twin in torch."""
