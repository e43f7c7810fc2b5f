"""The training loop and what it needs: updates, optimizers, averages, checkpoints, processes, validation."""
