"""The training loop, the step and its exact arithmetic."""
