"""Perplexity by length, a metric for the `evaluate` library, and plots."""
