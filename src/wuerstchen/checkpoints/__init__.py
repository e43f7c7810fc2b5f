"""Weights from files to models and back: one module for each layout."""
