"""The networks, and their fused CUDA versions."""
