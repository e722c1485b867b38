"""Reading, writing, importing and gating stock safetensors checkpoints."""
