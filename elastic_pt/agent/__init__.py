"""The long-lived process of each node."""
