"""The code that is saved with every checkpoint: slopes, windows, caches, attention and the model itself."""
