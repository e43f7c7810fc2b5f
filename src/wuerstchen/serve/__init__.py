"""The web page and the HTTP service: queue, workers and routes."""
