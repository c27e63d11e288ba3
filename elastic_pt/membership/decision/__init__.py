"""The pure part of membership: facts and `now_s` in, a decision with its reason out.

In reading order; docs/membership.md has the table of decisions.

    status      a node's own status, the facts about a peer, the operator's limits
    assessment  the state of the members: alive, gone, cut off, failed, leaving
    admission   which newcomers may join, and how many
    budgets     how many failures are accepted of a node and of the run
    memory      the facts that a node keeps between turns
    view        the facts of one turn
    causes      why members of a generation do not continue
    decide      View ──► Propose | Halt | Drain | Wait | Ended
"""
