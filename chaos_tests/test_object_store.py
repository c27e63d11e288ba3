"""The same promises where the run directory is a bucket on a real S3 server."""

import pytest

from chaos_tests.conftest import StartScenario
from chaos_tests.scenario import CHECKPOINT_STEPS, first_member

pytestmark = [pytest.mark.chaos, pytest.mark.ceph]


def test_rank_0s_node_is_lost_on_a_real_bucket(
    start: StartScenario, ceph_url: str, reference_digest: str
) -> None:
    """F6 on S3: log, checkpoints and resume need nothing that a file system has and a bucket has not."""
    run = start(run_url=f"{ceph_url}/run", nodes=2)
    run.until_step(CHECKPOINT_STEPS + 3, nodes=2)
    victim = first_member(run.generation())
    run.fleet.kill(victim)
    run.finish()
    newest = run.check_whole(reference_digest).generations[-1]
    assert newest.reason == f"lost {victim}"
    assert newest.resume is not None
