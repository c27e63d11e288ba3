"""An upload takes longer than any generation lives: checkpoints are committed all the same."""

import os
import signal
from collections.abc import Iterator

import pytest

from chaos_tests.conftest import StartScenario
from chaos_tests.scenario import Scenario
from elastic_pt.chaos.ceph import ACCESS_KEY, SECRET_KEY, Ceph
from elastic_pt.chaos.processes import workers_of
from elastic_pt.chaos.s3_faults import Delay
from elastic_pt.chaos.s3_proxy import FaultProxy
from elastic_pt.runlog.records import Commit
from tests.services.fixtures import point_aws_at

pytestmark = [pytest.mark.chaos, pytest.mark.ceph]

UPLOAD_S = 5.0
"""How long the bucket takes for each shard."""
ROUNDS = 4
LOST_ROUND = 2
"""In which a whole node is lost."""


@pytest.fixture
def slow(
    start: StartScenario, ceph: Ceph, ceph_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Scenario]:
    """Three nodes whose bucket is slow for shards; the test reaches it directly."""
    with FaultProxy(ceph.endpoint) as proxy:
        run = start(
            "elastic.nodes_max=3",
            "elastic.flaps_max=100",
            "checkpoint.every_steps=3",
            "checkpoint.snapshot_every_steps=1",
            run_url=f"{ceph_url}/run",
        )
        assert run.view().length == 0
        proxy.strike(Delay(UPLOAD_S), methods=["PUT"], key="*/shard-*")
        point_aws_at(proxy.endpoint, ACCESS_KEY, SECRET_KEY, monkeypatch)
        for number in range(3):
            run.fleet.start(f"node-{number}")
        yield run


def outlived(run: Scenario) -> list[int]:
    """The steps of the checkpoints that a later generation committed."""
    return [
        record.body.newest.step
        for record in run.records()
        if isinstance(record.body, Commit) and record.generation > record.body.newest.generation
    ]


def test_generations_that_live_shorter_than_an_upload_still_commit(
    slow: Scenario, reference_digest: str
) -> None:
    """Workers and a node are killed while a checkpoint is uploaded: later generations commit it, and the bits are the same."""
    for number in range(ROUNDS):
        slow.until("a generation", lambda: slow.view().generation is not None)
        before = slow.generation()
        slow.until_step(before.resume_step + 4, nodes=len(before.members))
        victim = before.members[number % len(before.members)].node
        if number == LOST_ROUND:
            slow.fleet.kill(victim)
        else:
            os.kill(workers_of(slow.fleet.pid(victim), slow.mark)[0], signal.SIGKILL)
        slow.until(
            "the next generation",
            lambda: slow.generation().number > before.number,  # noqa: B023
        )
    slow.finish()
    whole = slow.check_whole(reference_digest)
    assert len(whole.generations) > ROUNDS
    steps = outlived(slow)
    assert steps
    # The lost node's part of the checkpoint in flight came from its mirror.
    survivors = [each.node for each in whole.generations[-1].members]
    adopted = [event["step"] for node in survivors for event in slow.events(node, "upload_adopted")]
    assert set(adopted) & set(steps)
