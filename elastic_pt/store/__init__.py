"""Bytes under keys below one URL: the only thing of a run that has to survive."""
