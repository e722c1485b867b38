"""Depth methods that drop layers, or average them, by a score of every layer."""
