"""Batches for training, as functions of the image index."""
