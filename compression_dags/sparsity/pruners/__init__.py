"""Pruners: which weights of a matrix go, and what the kept ones become."""
