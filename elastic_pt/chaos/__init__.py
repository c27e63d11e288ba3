"""Chaos runs: faults strike a real run on this machine, and its final weights are the judge (docs/chaos.md)."""
