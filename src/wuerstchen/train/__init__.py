"""Training: one loop, a module for each stage, checkpoints, costs and the report of a run."""
