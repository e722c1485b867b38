"""CoMe (Wang et al. 2025): adjacent layers concatenated channel by channel."""
