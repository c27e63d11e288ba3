"""Telemetry for operators: metrics, events, goodput."""
