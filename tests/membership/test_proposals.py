"""The store's check and the platform in a GENERATION, and which agents may append one."""

import json

import pytest

from elastic_pt.agent.start import require_fencing
from elastic_pt.config import Config, parse_config
from elastic_pt.errors import ConfigError
from elastic_pt.membership.decision.status import NodePhase
from elastic_pt.runlog.log import RunLog, RunView, record_key
from elastic_pt.runlog.records import Reopen
from tests.membership.bucket import WatchedStore
from tests.membership.fleet import TICK_S, Fleet, names
from tests.membership.world import LIMITS, failed

OLD, NEW = {"processor": "x86_64 AVX2"}, {"processor": "x86_64 AVX512"}


def config(*overrides: str) -> Config:
    """The smallest configuration, with overrides."""
    text = '[run]\nurl = "run"\n[data]\nurl = "data"\n'
    return parse_config(text, source="test", overrides=overrides)


def start_agent(fleet: Fleet, name: str) -> None:
    """Check the store as an agent does, then start a node with the result."""
    checked_url = fleet.log.fenced_url
    fleet.fenced_url = require_fencing(fleet.bucket, config(), checked_url)
    fleet.start(name)


def races(bucket: WatchedStore) -> int:
    """Requests of store checks so far."""
    return sum(count for request, count in bucket.requests.items() if "storage-check-" in request)


def reopen_for_another_platform(bucket: WatchedStore) -> None:
    """The record that `elastic-pt reopen --platform` appends."""
    log = RunLog(bucket, writer="operator")
    number = log.refresh().generation_number
    log.append(lambda _: Reopen("only new ones are left", True, 0), generation=number)


def wait_for_takeover(fleet: Fleet) -> None:
    """Let nodes detect that neither log nor pulse changes, and continue."""
    for _ in range(round((2 * LIMITS.elastic.takeover_s + 4.0) / TICK_S)):
        fleet.pass_time(TICK_S)
        for node in fleet.alive():
            node.step_pulse()


# ---- the store is checked once per run ---------------------------------------------------------------


def test_only_the_first_agent_of_a_run_checks_the_store(fleet: Fleet, bucket: WatchedStore) -> None:
    """If a GENERATION records that the store is fenced, an agent that starts makes no request to check it."""
    start_agent(fleet, "a")
    assert races(bucket) > 10
    fleet.pass_time(4.0)
    assert fleet.run().fenced_url == bucket.url
    bucket.requests.clear()
    start_agent(fleet, "b")
    assert races(bucket) == 0
    fleet.pass_time(4.0)
    fleet.spend(1, "a")
    fleet.pass_time(4.0)
    assert names(fleet.log.generation) == ["a", "b"]
    assert fleet.log.fenced_url == bucket.url


def test_a_proposer_that_did_not_check_keeps_the_recorded_url(
    fleet: Fleet, bucket: WatchedStore
) -> None:
    """A proposer that has not checked the store itself copies the URL from the log."""
    start_agent(fleet, "a")
    fleet.pass_time(4.0)
    fleet.run()
    fleet.fenced_url = ""
    fleet.start("b")
    fleet.dead = {"a"}
    wait_for_takeover(fleet)
    assert names(fleet.log.generation) == ["b"]
    assert fleet.log.fenced_url == bucket.url


def test_a_run_of_an_earlier_version_is_checked_once_more(
    fleet: Fleet, bucket: WatchedStore
) -> None:
    """A GENERATION without the field is read, and its store is checked again."""
    fleet.form("a")
    key = record_key(0)
    document = json.loads(bucket.read(key))
    assert document["body"].pop("fenced_url") == ""
    bucket.write(key, json.dumps(document).encode())
    assert fleet.log.fenced_url == ""
    assert require_fencing(bucket, config(), fleet.log.fenced_url) == bucket.url
    assert races(bucket) > 10


def test_a_copied_run_is_checked_at_its_new_place(bucket: WatchedStore) -> None:
    """The record of a copied run directory does not hold for the new store."""
    assert require_fencing(bucket, config(), "s3://elsewhere/run") == bucket.url
    assert races(bucket) > 10


def test_a_single_node_does_not_check_the_store(bucket: WatchedStore) -> None:
    """With elastic.nodes_max = 1 a store without create-once is allowed, so there is no check and no record."""
    assert require_fencing(bucket, config("elastic.nodes_max=1"), "") == ""
    assert races(bucket) == 0


# ---- the platform that the run is bound to -----------------------------------------------------------


def test_an_agent_stopped_during_reopen_appends_no_generation(
    fleet: Fleet, bucket: WatchedStore
) -> None:
    """I9: an agent that ran before `reopen --platform` appends no GENERATION after it, even without new nodes."""
    fleet.platform = OLD
    fleet.form("a")
    fleet.off = {"a"}
    reopen_for_another_platform(bucket)
    fleet.off = set()
    fleet.spend(1, "a", failure=failed("a"))
    with pytest.raises(ConfigError, match="reopened for another platform after generation 1"):
        fleet.pass_time(10.0)
    assert fleet.log.generation_number == 1


def test_a_reopen_between_reading_and_appending_is_noticed(
    fleet: Fleet, bucket: WatchedStore
) -> None:
    """The platform is compared with the log that the GENERATION would follow."""
    fleet.platform = OLD
    fleet.form("a")

    def choose_resume(_: RunView) -> None:
        reopen_for_another_platform(bucket)

    fleet.choose_resume = choose_resume
    fleet.spend(1, "a", failure=failed("a"))
    with pytest.raises(ConfigError, match="reopened for another platform"):
        fleet.pass_time(1.0)
    assert fleet.log.generation_number == 1


def test_an_old_agent_does_not_replace_nodes_of_the_new_platform(
    fleet: Fleet, bucket: WatchedStore
) -> None:
    """I9: if the run has changed its platform and its nodes are gone, an old agent that wakes up ends."""
    fleet.platform = OLD
    fleet.form("a")
    fleet.off = {"a"}
    reopen_for_another_platform(bucket)
    fleet.platform = NEW
    fleet.start("b")
    wait_for_takeover(fleet)
    assert fleet.run().platform == NEW
    fleet.off, fleet.dead = set(), {"b"}
    fleet.nodes["a"].me.say(phase=NodePhase.WAITING, spent=1)
    with pytest.raises(ConfigError, match=r"processor = 'x86_64 AVX2': .* has 'x86_64 AVX512'"):
        wait_for_takeover(fleet)
    assert fleet.log.generation_number == 2


def test_an_agent_that_is_started_after_reopen_may_be_of_any_platform(
    fleet: Fleet, bucket: WatchedStore
) -> None:
    """`reopen --platform` accepts any node that is started afterwards, with any platform."""
    fleet.platform = OLD
    fleet.form("a")
    fleet.off = {"a"}
    reopen_for_another_platform(bucket)
    fleet.start("b")
    wait_for_takeover(fleet)
    assert names(fleet.log.generation) == ["b"]


def test_with_native_numerics_no_platform_is_compared(fleet: Fleet, bucket: WatchedStore) -> None:
    """With native numerics an agent that ran before a reopen continues."""
    fleet.form("a")
    reopen_for_another_platform(bucket)
    fleet.spend(1, "a", failure=failed("a"))
    fleet.pass_time(1.0)
    assert fleet.log.generation_number == 2
