"""Depth: which layers stay, and how others are dropped, merged or concatenated."""
