"""Fused CUDA versions of the networks' blocks, with Triton kernels. The plain ones are the reference."""
