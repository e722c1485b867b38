"""States of made-up layers for the similarity tests."""

import torch


def stream(layers=4, tokens=160, width=24, seed=0, step=0.8):
    """States that drift from layer to layer, as a residual stream's do: (L, n, d) float32."""
    g = torch.Generator().manual_seed(seed)
    first = torch.randn(1, tokens, width, generator=g) * torch.linspace(3, 0.2, width)
    return first + step * torch.randn(layers, tokens, width, generator=g).cumsum(0)


def noise(layers, tokens, seed=0):
    return torch.randn(layers, tokens, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def broken(layer, value):
    hidden = stream(3)
    hidden[layer] = value
    return hidden


def one_entry(value):
    hidden = stream(3)
    hidden[2, 5, 1] = value
    return hidden
