"""Measurements, run by hand. A regular package, so that no installed one of the same name takes its place."""
