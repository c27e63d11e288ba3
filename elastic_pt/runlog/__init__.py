"""The run directory's shared truth: the log's records, how they are appended, and what all nodes agree on."""
