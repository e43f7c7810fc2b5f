"""CUDA graphs for sampling and training, and offloading for small GPUs."""
