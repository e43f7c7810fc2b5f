"""The version of the package, which needs nothing else of it."""

__version__ = "0.1.0.dev0"
