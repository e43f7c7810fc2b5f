"""Reports about a run: events, costs, curves and the HTML page."""
