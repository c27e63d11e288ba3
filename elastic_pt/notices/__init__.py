"""Notices: what a platform says ahead of time of a machine that will be taken away, or may be.

    aws  gcp  azure  file  webhook      one source a file: what it says of its events now ─► Announcement
    signals                             what SIGTERM and SIGUSR1 mean under Kubernetes and Slurm
    message                             the form in which an operator's own tool says it (file, webhook)
    detect                              `elastic.notices` and this machine ─► which sources to watch
    watch                               one thread asks them ─► notice.update ─► notice.decide ─► heed(Decision)
    notice                              the one normal form, and the pure decision what it means

A source tells all its events each time. So an event that is told twice changes nothing, and one that is not told any
more was withdrawn. A source that does not answer withdraws nothing. Agent process.
"""
