"""Scripts that train, compare and draw; each runs as `python -m experiments.NAME`."""
