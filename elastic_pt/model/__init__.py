"""The transformer, its loss, its sharding and its export."""
