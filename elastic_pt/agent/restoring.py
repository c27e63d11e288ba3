"""What a node fetches from its peers before its workers resume from a state in memory. Agent process, main thread.

The rows themselves are read by the workers (`checkpoint.memory`).
"""

import structlog

from elastic_pt.checkpoint.history import HISTORY_BYTES_MAX, StepHistory
from elastic_pt.checkpoint.peer import STEPS_PATH, Peer, PeerAddress
from elastic_pt.errors import ElasticPtError
from elastic_pt.membership.node import Formed
from elastic_pt.runlog.access import Access

log = structlog.get_logger("elastic_pt.agent.restoring")


def complete_history(
    history: StepHistory, formed: Formed, committed_step: int, access: Access, timeout_s: float
) -> None:
    """Have the lines of all steps from the last commit to the state in memory: this node may have to write them.

    A node that was no member when a step was done asks those that hold the state.
    """
    memory, members = formed.generation.memory, formed.generation.members
    first = committed_step + 1
    if memory is None or memory.step < first or not history.misses(first, memory.step):
        return
    for index in sorted(set(memory.sources) - {formed.node_rank}):
        address = PeerAddress(members[index].address, members[index].port)
        try:
            text = Peer(address, access, timeout_s).get(STEPS_PATH, HISTORY_BYTES_MAX)
            if text is not None and history.adopt(text, first, memory.step):
                return
        except (ElasticPtError, ValueError, KeyError, TypeError) as error:
            log.warning("history_not_read", peer=members[index].node, cause=str(error))
    log.warning("history_incomplete", first_step=first, last_step=memory.step)
