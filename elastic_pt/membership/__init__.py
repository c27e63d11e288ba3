"""Which nodes train: the messages between nodes, the decision, and the thread that executes it.

In reading order; docs/membership.md follows a lost peer through these files.

    decision      the pure part: what follows from the facts of one turn
    peers         messages, and what they prove: `PeerTable`
    lobby, pulse  hints in the bucket, for nodes that can ask no member
    contacts      which nodes this one asks, and of which nodes silence counts

    own_status    this node's own status
    known_nodes   who is up, who stays, what they hold together
    appender      appends GENERATION, QUARANTINE, STOP and RECOVERY, as decided
    resources     the dependencies of a participant
    participant   one node's part: read, assess, decide, act, in `turn`

    links         WebSockets between agents
    thread        the membership thread: links and turns
    tcp_store     the store of one generation
    node          the main thread's view: state the own phase, await the next generation
    rendezvous    the same behind torch elastic's interface, also for stock torchrun
    asking        one question to several agents at once
    endpoints     where nodes serve metrics, and who can reach that
    discovery     the endpoints of all nodes, for Prometheus
    address       addresses of this machine, and how to avoid DNS
"""
