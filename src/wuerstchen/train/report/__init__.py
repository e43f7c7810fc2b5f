"""What a run leaves to be read: events, costs, curves and its page."""
