"""MKA (Liu et al., EMNLP 2024): adjacent layers merged by manifold similarity; ours, the paper's, the repository's."""
