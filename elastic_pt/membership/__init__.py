"""Who trains: what nodes tell each other, the pure decision, and the thread that carries it out.

The files in reading order; docs/membership.md follows a lost peer through them and has the table of decisions.

    status        a node's own status, what it knows of a peer, the operator's limits
    peers         messages, and what they prove: `PeerTable`
    lobby, pulse  hints in the bucket, for nodes that can ask no member
    contacts      which nodes this one asks, and whose silence counts
    assessment    the state of the members: alive, gone, cut off, failed, leaving
    admission     which newcomers may join, and how many
    budgets       how many failures are accepted of a node and of the run
    memory, view  what a node remembers between turns; the facts of one turn
    decide        View ──► Propose | Halt | Drain | Wait | Ended

    own_status    what this node says of itself
    appender      GENERATION, QUARANTINE, STOP and RECOVERY, as decided
    pulse_watch   the use of the pulse
    resources     what a participant works with
    participant   one node's part: hear, look, decide, act, in `turn`

    links         WebSockets between agents
    thread        the membership thread: links and turns
    tcp_store     the store of one generation
    node          the main thread's view: state the own phase, await the next generation
    rendezvous    the same behind torch elastic's interface, also for stock torchrun
    address, lookups   addresses of this machine; no DNS on the way
"""
