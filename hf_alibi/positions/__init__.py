"""The same decoder with other position methods, for comparison."""
