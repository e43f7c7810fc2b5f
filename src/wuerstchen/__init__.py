"""Würstchen: text-to-image in a latent map shrunk 42 times. See README.md."""

__version__ = "0.1.0.dev0"
