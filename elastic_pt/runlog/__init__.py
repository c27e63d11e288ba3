"""The run's log: its records, how they are appended, and the identity that all nodes agree on."""
