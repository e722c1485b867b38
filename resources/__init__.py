"""The outside world: devices, models, storage, evaluation data."""
