"""Benchmarks, run by hand. A regular package, so that Python does not import an installed one of the same name."""
