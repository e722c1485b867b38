"""Base LLMs in; compressed, measured, servable checkpoints out."""

__version__ = "0.1.0"
