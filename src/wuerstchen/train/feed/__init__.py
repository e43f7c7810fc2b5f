"""Batches for training, as functions of the image's index."""
