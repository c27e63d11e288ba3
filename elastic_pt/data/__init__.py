"""From a corpus to the rows of a step: prepare, shards, order, loader.

The defaults of `prepare` are here, so that the command line can show them without importing `data.prepare`.
"""

VOCABULARY = 8192
"""Tokens that the tokenizer learns."""
HELD_OUT = 0.01
"""Share of documents kept for evaluation."""
LEFT_OUT_MAX = 0.1
"""Share of a source's files that may be left out."""
