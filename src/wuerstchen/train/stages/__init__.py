"""One file for each thing that is trained: its losses and its networks."""
