"""Sparsity: how much of each matrix goes, which weights, and what the kept ones become."""
