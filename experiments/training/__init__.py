"""One training run: configuration, model, optimizer, steps, checkpoints."""
