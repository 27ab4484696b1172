"""What a training run costs before it runs: parameters, memory, operations and time."""
