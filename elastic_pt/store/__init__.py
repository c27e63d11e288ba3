"""Bytes under keys below one URL. Only they have to survive for a run to continue."""
