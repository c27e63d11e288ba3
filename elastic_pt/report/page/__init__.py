"""The report of a run: one HTML page that needs no network.

    log, history/, accounts, agents ─► facts ─► model ─► drawing, template.html ─► the page
                                       reads    pure     pure

Everything comes from the run's URL. Facts of a run of a month fit into memory: the history is read one commit at a time,
and of each step a few numbers are kept. Runs in the command line's process, and imports no torch.
"""
