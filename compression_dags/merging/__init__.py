"""Depth: similarity of layers, plans that drop or merge them, their application, closed-form recovery."""
