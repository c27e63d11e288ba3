"""Notices: messages of a platform that a machine will be taken away, or may be.

    aws  gcp  azure  file  webhook      one source a file: its current events ─► Announcement
    signals                             what SIGTERM and SIGUSR1 mean under Kubernetes and Slurm
    message                             the format for an operator's own tool (file, webhook)
    detect                              `elastic.notices` and this machine ─► which sources to watch
    watch                               one thread reads them ─► notice.update ─► notice.decide ─► heed(Decision)
    notice                              the normal form of a notice, and the pure decision what to do

A source returns all its events at each read. So a repeated event changes nothing, and an event that is missing was
withdrawn. A source that does not answer withdraws nothing. Agent process.
"""
