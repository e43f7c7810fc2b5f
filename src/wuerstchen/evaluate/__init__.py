"""Fixed lists of captions and images, judges, metrics, and the report about a model."""
