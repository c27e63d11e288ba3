"""Real S3 servers for tests: how they are installed, started for a session, and stopped."""
