"""The same rules with the run directory in a bucket on a real S3 server."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos_tests.conftest import CORPUS_CHARACTERS, VOCABULARY, StartScenario
from chaos_tests.scenario import CHECKPOINT_STEPS, Scenario, first_member
from elastic_pt.chaos.ceph import ACCESS_KEY, SECRET_KEY, Ceph
from elastic_pt.chaos.processes import workers_of
from elastic_pt.chaos.s3_faults import SLOW_DOWN, Cut
from elastic_pt.chaos.s3_proxy import FaultProxy
from elastic_pt.data.prepare import prepare
from elastic_pt.data.sources import standard_library_source
from elastic_pt.store.open import open_store
from tests.services.fixtures import point_aws_at

pytestmark = [pytest.mark.chaos, pytest.mark.ceph]

DEADLINE_S = 3.0
ERRORS_SHARE = 0.3
ERRORS_SEED = 7
SHARD_TOKENS = 10_000
CACHED_SHARDS = 5
"""Each of two workers maps a shard and needs room for the next one."""


@pytest.fixture
def proxied(
    start: StartScenario, ceph: Ceph, ceph_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Scenario, FaultProxy]]:
    """Two nodes that reach their bucket through a proxy; the test reaches it directly."""
    with FaultProxy(ceph.endpoint) as proxy:
        run = start("elastic.nodes_max=2", "store.deadline_s=60", run_url=f"{ceph_url}/run")
        # The test's own connection is made before the address changes.
        assert run.view().length == 0
        point_aws_at(proxy.endpoint, ACCESS_KEY, SECRET_KEY, monkeypatch)
        for number in range(2):
            run.fleet.start(f"node-{number}")
        yield run, proxy


def test_training_continues_without_the_bucket(
    proxied: tuple[Scenario, FaultProxy], reference_digest: str
) -> None:
    """F5: while no node can reach the bucket the world trains on; afterwards the checkpoints are written."""
    run, proxy = proxied
    run.until_step(CHECKPOINT_STEPS + 3, nodes=2)
    proxy.strike(Cut())
    run.until_step(4 * CHECKPOINT_STEPS, nodes=2)
    proxy.mend()
    run.finish()
    assert len(run.check_whole(reference_digest).generations) == 1


def test_recovery_waits_for_the_bucket(
    proxied: tuple[Scenario, FaultProxy], reference_digest: str
) -> None:
    """F5: without the log no new generation can be decided; as soon as the bucket answers the run resumes."""
    run, proxy = proxied
    run.until_step(CHECKPOINT_STEPS + 3, nodes=2)
    first = run.generation()
    proxy.strike(Cut())
    victim = first_member(first)
    survivor = next(each.node for each in first.members if each.node != victim)
    run.fleet.kill(victim)
    run.until(
        "the other cannot reach the bucket", lambda: bool(run.events(survivor, "store_retry"))
    )
    assert run.generation() == first
    proxy.mend()
    run.finish()
    assert run.check_whole(reference_digest).generations[-1].reason == f"lost {victim}"


def test_commits_resume_after_an_outage_longer_than_the_deadline(
    start: StartScenario,
    ceph: Ceph,
    ceph_url: str,
    reference_digest: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """F28: an upload fails at `store.deadline_s`, training goes on; then 30 % of all requests fail, and commits resume."""
    with FaultProxy(ceph.endpoint, seed=ERRORS_SEED) as proxy:
        run = start(
            "elastic.nodes_max=2", f"store.deadline_s={DEADLINE_S}", run_url=f"{ceph_url}/run"
        )
        assert run.view().length == 0
        point_aws_at(proxy.endpoint, ACCESS_KEY, SECRET_KEY, monkeypatch)
        for number in range(2):
            run.fleet.start(f"node-{number}")
        run.until_step(1, nodes=2)
        proxy.strike(Cut())
        run.until(
            "an upload has failed",
            lambda: any(run.events(f"node-{number}", "upload_failed") for number in range(2)),
        )
        proxy.mend()
        proxy.strike(SLOW_DOWN, share=ERRORS_SHARE)
        run.finish()
        run.check_whole(reference_digest)


def test_a_corpus_on_s3_larger_than_the_cache(
    start: StartScenario, ceph_url: str, reference_digest: str, tmp_path: Path
) -> None:
    """F46: token shards go through a bounded cache, never into the staging directory, and the bits are the same."""
    url, cache = f"{ceph_url}/data", tmp_path / "cache"
    manifest = prepare(
        [standard_library_source(CORPUS_CHARACTERS)],
        open_store(url),
        vocab_size=VOCABULARY,
        held_out=0.05,
        shard_tokens=SHARD_TOKENS,
    )
    bound = CACHED_SHARDS * 2 * SHARD_TOKENS
    assert bound < 2 * manifest.tokens("train")
    run = start(
        "elastic.workers_per_node=2",
        f"data.url={url}",
        f"data.cache={cache}",
        f"data.cache_bytes={bound}",
        run_url=f"{ceph_url}/run",
        nodes=1,
    )
    run.until_step(CHECKPOINT_STEPS + 3, nodes=1)
    scratch = [path for path in Path("/dev/shm").glob("elastic_pt-*") if path.is_dir()]
    assert scratch
    assert [path for each in scratch for path in each.rglob("*.bin")] == []
    os.kill(workers_of(run.fleet.pid("node-0"), run.mark)[0], signal.SIGKILL)
    run.finish()
    run.check_whole(reference_digest)
    kept = sum(path.stat().st_blocks * 512 for path in [cache, *cache.rglob("*")])
    assert 0 < kept <= bound
