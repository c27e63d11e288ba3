"""Real servers for tests (S3, Prometheus): how they are installed, started for a session, and stopped."""
