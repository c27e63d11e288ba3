"""Elastic pre-training on machines that get taken away."""

__version__ = "0.2.0"
