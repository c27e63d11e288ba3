"""Reports on a run, read from its run directory while it trains or later."""
