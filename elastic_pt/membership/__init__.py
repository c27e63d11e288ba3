"""Who trains: what nodes tell each other, the decision, and the thread that carries it out.

In reading order; docs/membership.md follows a lost peer through these files.

    decision      the pure part: what follows from the facts of one turn
    peers         messages, and what they prove: `PeerTable`
    lobby, pulse  hints in the bucket, for nodes that can ask no member
    contacts      which nodes this one asks, and whose silence counts

    own_status    what this node says of itself
    appender      GENERATION, QUARANTINE, STOP and RECOVERY, as decided
    resources     what a participant works with
    participant   one node's part: hear, look, decide, act, in `turn`

    links         WebSockets between agents
    thread        the membership thread: links and turns
    tcp_store     the store of one generation
    node          the main thread's view: state the own phase, await the next generation
    rendezvous    the same behind torch elastic's interface, also for stock torchrun
    address       addresses of this machine; no DNS on the way
"""
