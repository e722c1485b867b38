"""Repair of a model after a cut or merge; never accepted if worse."""
