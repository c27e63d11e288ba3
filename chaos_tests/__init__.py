"""Real agents on real processes, disturbed on purpose; every scenario checks the whole run."""
