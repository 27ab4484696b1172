"""Loading and publishing checkpoints, with a model card."""
