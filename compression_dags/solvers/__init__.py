"""What sparsity and quantization share: Hessians, their factors, and the blocked column sweep."""
