"""What a scenario needs and this machine lacks. Known before a run begins; starts nothing."""

from collections.abc import Collection

from elastic_pt.chaos.ceph import missing_for_ceph
from elastic_pt.chaos.kinds import Need
from elastic_pt.chaos.mounts import missing_for_mounts
from elastic_pt.chaos.play import needs_of
from elastic_pt.chaos.scenario import Scenario
from elastic_pt.fleet.network import missing_for_networks


class Machine:
    """This machine, asked once: what it lacks does not change while a command runs."""

    def __init__(self) -> None:
        self._why = {each: _why_not(each) for each in Need}

    @property
    def networks(self) -> bool:
        """Whether each node can have a network of its own."""
        return not self._why[Need.NETWORK]

    def lacks(self, needs: Collection[Need]) -> str:
        """Why these needs are not met, in one line; empty if they are."""
        missing = [
            f"no {each} ({self._why[each]})" for each in Need if each in needs and self._why[each]
        ]
        return ", ".join(missing)

    def cannot_play(self, scenario: Scenario) -> str:
        """Why a scenario cannot be played here; empty if it can."""
        return self.lacks(needs_of(scenario))


def _why_not(need: Need) -> str:
    """Why this machine does not have it, as a clause; empty if it has."""
    match need:
        case Need.NETWORK:
            return missing_for_networks()
        case Need.BUCKET:
            return missing_for_ceph()
        case Need.DISK:
            return missing_for_mounts()
