"""How networks run when sampling: recorded as CUDA graphs, or moved to a small GPU part by part."""
