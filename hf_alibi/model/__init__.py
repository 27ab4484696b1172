"""All that travels with a checkpoint: slopes, windows, caches, attention and the model itself."""
