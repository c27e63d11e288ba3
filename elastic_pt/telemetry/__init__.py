"""What an operator sees: metrics, events, goodput, plots."""
