"""Tests of the chaos harness, without agents."""
