"""The nodes of a run as scrape targets, from the run's URL alone. Runs in the command line's process.

    members, lobby ─► status of each that answers ─► endpoints of all nodes, from two that know them ─► targets

The answer of a member also has nodes that wait. An endpoint on loopback is listed on its own machine only.
"""

from elastic_pt.errors import NotFound
from elastic_pt.membership.address import own_addresses
from elastic_pt.membership.asking import ask_endpoints, ask_status
from elastic_pt.membership.decision.status import LEADERS
from elastic_pt.membership.endpoints import Endpoint, endpoints_of, reachable
from elastic_pt.membership.lobby import LOBBY, members_in
from elastic_pt.report.status import ANSWER_TIMEOUT_S, Run


def read_endpoints(run: Run) -> list[Endpoint]:
    """The endpoints of all nodes that are up and that this machine can reach. Raises `StoreError`.

    Asks agents twice, each time for at most `ANSWER_TIMEOUT_S`.
    """
    generation = run.log.refresh().generation
    known = {each.incarnation: each for each in members_in(run.store.keys(LOBBY))}
    members = () if generation is None else generation.members
    # Members first, in rank order: the first ones know all nodes.
    asked = {each.incarnation: each for each in members} | known
    try:
        access = run.access()
    except NotFound:
        if generation is None:
            return []
        # The run has had agents. Its directory is not there now, which says nothing about them.
        raise
    answers = ask_status(asked.values(), access, ANSWER_TIMEOUT_S)
    first = [member for incarnation, member in asked.items() if incarnation in answers][:LEADERS]
    told = ask_endpoints(first, access, ANSWER_TIMEOUT_S)
    found = [*endpoints_of(answers.values()), *(each for some in told.values() for each in some)]
    return reachable(found, "127.0.0.1", own_addresses())
