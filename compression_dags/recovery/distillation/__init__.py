"""Hierarchical distillation of merged layers."""
