"""Corpus to tokens, and the order in which a run reads them."""
