"""Who trains: the run's log, membership, rendezvous and the processes of one node."""
