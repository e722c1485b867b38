"""One budget, all knobs: what every layer could become, what that costs and saves, and the best choice of all."""
