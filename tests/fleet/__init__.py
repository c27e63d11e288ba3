"""Several nodes on one machine, without agents."""
