"""A deterministic simulator of many agents: the production membership code over simulated everything else."""
