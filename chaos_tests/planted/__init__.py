"""Bugs that tests plant into the product, to see that an oracle finds each of them.

    PYTHONPATH=site:...  ─► sitecustomize of each agent ─► `plant(os.environ[VARIABLE])` ─► patches a module as it is imported

The product itself has no trace of them. Fork server and workers are forked from the agent, so they have the bug, too.
"""
