"""The oracle `evidence`, on runs that are made up: what has to be told, what nobody could see, and what is told wrongly."""

from pathlib import Path

import pytest

from elastic_pt.chaos.directory import Objection
from elastic_pt.runlog.records import CauseKind, Quarantine, Verb
from tests.chaos.made_up import NODES, MadeRun, append

LOST, LEFT, FAILED = CauseKind.LOST, CauseKind.LEFT, CauseKind.FAILED
PARKED, JOINED, GAVE_UP = CauseKind.PARKED, CauseKind.JOINED, CauseKind.GAVE_UP
SIGNALLED = 'elastic_pt_worker_failures_total{cause="signal"} 1.0'


@pytest.fixture
def run(tmp_path: Path) -> MadeRun:
    """Three nodes that train."""
    return MadeRun(tmp_path)


def objection(run: MadeRun) -> str:
    """What the oracle objects to."""
    with pytest.raises(Objection) as caught:
        run.judged()
    return str(caught.value)


# ---- a cause -----------------------------------------------------------------------------------------


def test_a_lost_node_is_told_by_a_cause_that_names_it(run: MadeRun) -> None:
    """The cause is `lost`, of the node that was struck."""
    run.strike(20.0, "kill_node", "node-1")
    run.generation(21.0, "node-0", "node-2", causes=[(LOST, "node-1")])
    run.stop()
    assert run.judged() == "1 faults told"


@pytest.mark.parametrize("cause", [(LEFT, "node-1"), (PARKED, "node-1"), (LOST, "node-2")])
def test_another_cause_or_another_node_is_an_objection(
    cause: tuple[CauseKind, str], run: MadeRun
) -> None:
    """Both ways: the fault has no cause, and the cause has no fault."""
    run.strike(20.0, "kill_node", "node-1")
    run.generation(21.0, "node-0", "node-2", causes=[cause])
    run.stop()
    told = objection(run)
    assert "fault 1 (kill_node node-1): no later generation has the cause lost of it" in told
    assert f"generation 2 has the cause {cause[0]} of {cause[1]}, which no fault explains" in told


def test_the_loss_of_all_members_needs_no_cause(run: MadeRun) -> None:
    """Nobody is left who knows it."""
    run.strike(20.0, "kill_node", *NODES)
    run.generation(30.0, *(f"{node}/2" for node in NODES))
    run.stop()
    assert run.judged() == "1 faults told"


def test_a_later_loss_of_others_does_not_tell_of_a_node_that_was_no_member(run: MadeRun) -> None:
    """Only whom the lost generation had can have been lost with it."""
    run.strike(20.0, "kill_node", "node-1")
    run.generation(21.0, "node-0", "node-2", causes=[(PARKED, "node-1")])
    run.strike(30.0, "kill_node", "node-0", "node-2", generation=2, members=["node-0", "node-2"])
    run.generation(40.0, *(f"{node}/2" for node in NODES))
    run.stop()
    assert "fault 1 (kill_node node-1)" in objection(run)


def test_a_second_node_is_told_too(run: MadeRun) -> None:
    """That another fault had ended the generation excuses nothing: the next one would have it as a member, and lose it."""
    run.strike(20.0, "kill_node", "node-1")
    run.strike(20.2, "kill_node", "node-2")
    run.generation(21.0, "node-0", causes=[(LOST, "node-1")])
    run.stop()
    told = objection(run)
    assert "fault 2 (kill_node node-2): no later generation" in told
    assert "generation 2 is without node-2, and has no cause for that" in told


def test_a_second_node_that_the_next_generation_still_had_is_told_later(run: MadeRun) -> None:
    """The proposer did not know it yet."""
    run.strike(20.0, "kill_node", "node-1")
    run.strike(20.2, "kill_node", "node-2")
    run.generation(20.3, "node-0", "node-2", causes=[(LOST, "node-1")])
    run.generation(21.0, "node-0", causes=[(LOST, "node-2")])
    run.stop()
    assert run.judged() == "2 faults told"


@pytest.mark.parametrize("cause", [LEFT, LOST])
def test_two_faults_of_one_node_have_one_cause(cause: CauseKind, run: MadeRun) -> None:
    """A node that leaves and ends at once at a second signal has either left or is lost."""
    run.strike(20.0, "node_leaves", "node-1")
    run.strike(20.1, "second_sigterm", "node-1")
    run.generation(21.0, "node-0", "node-2", causes=[(cause, "node-1")])
    run.stop()
    assert run.judged() == "2 faults told"


def test_the_cause_of_another_fault_does_not_tell_of_a_member_that_stays(run: MadeRun) -> None:
    """The next generation still had it, so that a later one must miss it."""
    run.strike(20.0, "kill_worker", "node-1")
    run.event(20.1, "node-1", "worker_failed", "warning", kind="signal")
    run.strike(20.4, "kill_node", "node-1")
    run.generation(20.5, *NODES, causes=[(FAILED, "node-1")])
    run.stop()
    assert "fault 2 (kill_node node-1): no later generation" in objection(run)


def test_a_node_that_leaves_alone_is_not_lost(run: MadeRun) -> None:
    """Without the second signal `lost` is wrong."""
    run.strike(20.0, "node_leaves", "node-1")
    run.generation(21.0, "node-0", "node-2", causes=[(LOST, "node-1")])
    run.stop()
    assert "no later generation has the cause left of it" in objection(run)


def test_a_failure_that_ends_the_run_is_told_by_its_stop(run: MadeRun) -> None:
    """Then no generation follows."""
    run.strike(20.0, "worker_raises", "node-1")
    run.event(20.5, "node-1", "worker_failed", "warning", kind="exception")
    run.stop(21.0, "node-1: worker 1 raised ValueError")
    assert run.judged() == "1 faults told"


# ---- what nobody could see ---------------------------------------------------------------------------


def test_whoever_is_no_member_needs_no_cause(run: MadeRun) -> None:
    """A node that starts, or has gone, is missed by nobody."""
    run.strike(20.0, "kill_node", "node-3")
    run.stop()
    assert run.judged() == "0 faults told, 1 that nobody could see"


def test_a_node_that_becomes_a_member_at_that_moment_is_missed(run: MadeRun) -> None:
    """The generation that was being made has it."""
    run.event(10.0, "node-3", "agent_started")
    run.strike(20.0, "kill_node", "node-3")
    run.generation(20.5, *NODES, "node-3", causes=[(JOINED, "node-3")])
    run.stop()
    assert "no later generation has the cause lost of it" in objection(run)


@pytest.mark.parametrize(("for_s", "seen"), [(3.9, False), (4.3, False), (5.0, True)])
def test_a_silence_that_is_too_short_goes_unseen(for_s: float, seen: bool, run: MadeRun) -> None:
    """Nodes give up a peer after four seconds, and the newest message may be two intervals old."""
    run.strike(20.0, "node_freezes", "node-1", for_s=for_s)
    run.stop()
    if seen:
        assert "no later generation has the cause gave up or lost of it" in objection(run)
    else:
        assert run.judged() == "0 faults told, 1 that nobody could see"


def test_members_wait_anew_in_a_generation_that_began_meanwhile(run: MadeRun) -> None:
    """Six seconds of silence, of which the new generation has seen four."""
    run.strike(20.0, "agent_stops", "node-1", for_s=6.0)
    run.strike(21.9, "kill_worker", "node-2")
    run.event(22.0, "node-2", "worker_failed", "warning", kind="signal")
    run.generation(22.0, *NODES, causes=[(FAILED, "node-2")])
    run.stop()
    assert run.judged() == "1 faults told, 1 that nobody could see"


@pytest.mark.parametrize(("for_s", "seen"), [(3.0, False), (5.0, True)])
def test_a_short_fault_of_the_bucket_goes_unseen(for_s: float, seen: bool, run: MadeRun) -> None:
    """A run asks the bucket for something every few seconds only."""
    run.strike(20.0, "server_errors", for_s=for_s)
    run.stop()
    if seen:
        assert "no event store_retry of it" in objection(run)
    else:
        assert run.judged() == "0 faults told, 1 that nobody could see"


def test_connections_that_are_reset_for_a_moment_are_seen(run: MadeRun) -> None:
    """Both ends see a reset at once."""
    run.strike(20.0, "reset_connections", "node-1", for_s=1.0)
    run.stop()
    assert "no later generation has the cause" in objection(run)


def test_a_program_that_fails_for_a_moment_is_seen(run: MadeRun) -> None:
    """It is no silence: its end excuses nothing."""
    run.strike(20.0, "program_fails", "node-1", for_s=1.0)
    run.stop()
    told = objection(run)
    assert "no later generation has the cause failed" in told
    assert "no event worker_failed" in told


def test_a_freeze_of_all_is_seen_by_nobody(run: MadeRun) -> None:
    """All clocks stand still."""
    run.strike(20.0, "node_freezes", *NODES, for_s=9.0)
    run.stop()
    assert run.judged() == "0 faults told, 1 that nobody could see"


def test_a_freeze_of_some_while_the_others_are_frozen_is_seen_by_nobody(run: MadeRun) -> None:
    """Two faults together leave nobody who listens."""
    run.strike(20.0, "node_freezes", "node-0", for_s=9.0)
    run.strike(20.1, "agent_stops", "node-1", "node-2", for_s=9.0)
    run.stop()
    assert run.judged() == "0 faults told, 2 that nobody could see"


def test_the_loss_of_all_is_told_by_nobody_if_nobody_follows(run: MadeRun) -> None:
    """A generation that follows tells it. That none does is for another oracle."""
    run.strike(20.0, "kill_node", *NODES)
    assert run.judged() == "0 faults told, 1 that nobody could see"


def test_a_link_that_is_down_for_all_is_seen(run: MadeRun) -> None:
    """They are cut off, and listen."""
    run.strike(20.0, "link_down", *NODES, for_s=9.0)
    run.stop()
    assert "no later generation" in objection(run)


def test_either_side_of_a_split_without_a_majority_may_be_blamed(run: MadeRun) -> None:
    """Two of four: each pair may go on without the other."""
    four = (*NODES, "node-3")
    run.generation(10.0, *four, causes=[(JOINED, "node-3")])
    run.strike(20.0, "partition", "node-0", "node-1", for_s=9.0, generation=2, members=four)
    run.generation(
        26.0, "node-0", "node-1", causes=[(LOST, "node-2"), (LOST, "node-3")], agree_s=1.0
    )
    run.stop()
    assert run.judged() == "1 faults told"


def test_the_larger_side_of_a_split_is_not_blamed(run: MadeRun) -> None:
    """The two others go on without the leader, not the leader without them."""
    run.strike(20.0, "partition", "node-0", for_s=9.0)
    run.generation(26.0, "node-0", "node-1", causes=[(LOST, "node-2")])
    run.stop()
    told = objection(run)
    assert "fault 1 (partition node-0): no later generation" in told
    assert "the cause lost of node-2, which no fault explains" in told


@pytest.mark.parametrize("kind", ["one_way", "reset_connections", "halves"])
def test_a_cut_path_blames_one_end(kind: str, run: MadeRun) -> None:
    """Both ends live, so that either is right; none is not."""
    run.strike(20.0, kind, "node-1", for_s=9.0)
    run.stop()
    assert "no later generation has the cause" in objection(run)
    del run.records[-1]
    run.generation(26.0, "node-0", "node-1", causes=[(PARKED, "node-2")])
    run.stop()
    assert run.judged() == "1 faults told"


def test_a_fault_in_the_last_step_is_seen_only_if_a_generation_follows(run: MadeRun) -> None:
    """The run completes without it; but if it had to go on, it knows why."""
    run.strike(49.0, "kill_node", "node-1", step=47)
    run.stop()
    assert run.judged() == "0 faults told, 1 that nobody could see"
    del run.records[-1]
    run.generation(49.5, "node-0", "node-2", causes=[(PARKED, "node-1")])
    run.stop(55.0)
    assert "no later generation has the cause lost of it" in objection(run)


@pytest.mark.parametrize(("at_s", "seen"), [(46.5, True), (47.5, False)])
def test_a_node_that_leaves_in_the_last_seconds_goes_unseen(
    at_s: float, seen: bool, run: MadeRun
) -> None:
    """Training does not depend on it."""
    run.strike(at_s, "node_leaves", "node-1", step=40)
    run.stop()
    if seen:
        assert "no later generation has the cause left" in objection(run)
    else:
        assert run.judged() == "0 faults told, 1 that nobody could see"


def test_a_worker_that_dies_in_the_last_seconds_is_seen(run: MadeRun) -> None:
    """Training depends on it."""
    run.strike(49.0, "kill_worker", "node-1", step=40)
    run.stop()
    assert "no later generation has the cause failed" in objection(run)


@pytest.mark.parametrize(("kind", "passes"), [("signal", True), ("exit", False)])
def test_why_a_worker_died_is_asked_also_in_the_last_seconds(
    kind: str, passes: bool, run: MadeRun
) -> None:
    """The agent told its peers, so it had the time to write why."""
    run.strike(48.0, "kill_worker", "node-1", step=40)
    run.event(48.1, "node-1", "worker_failed", "warning", kind=kind)
    run.generation(48.3, *NODES, causes=[(FAILED, "node-1")])
    run.stop()
    if passes:
        assert run.judged() == "1 faults told"
    else:
        assert "no event worker_failed of it" in objection(run)


# ---- workers -----------------------------------------------------------------------------------------


def test_a_worker_that_dies_in_a_generation_that_is_known_to_end_goes_unseen(run: MadeRun) -> None:
    """Its agent ends it anyway."""
    run.strike(20.0, "node_freezes", "node-0", for_s=12.0)
    run.event(24.2, "node-1", "decision", kind="wait", reason="node-1 leads: lost node-0")
    run.strike(24.3, "kill_worker", "node-1")
    run.generation(24.5, "node-1", "node-2", causes=[(LOST, "node-0")])
    run.stop()
    assert run.judged() == "1 faults told, 1 that nobody could see"


def test_a_worker_that_dies_before_anybody_missed_the_frozen_node_is_seen(run: MadeRun) -> None:
    """Its generation trained as far as anybody knew."""
    run.strike(20.0, "node_freezes", "node-0", for_s=12.0)
    run.strike(21.5, "kill_worker", "node-1")
    run.event(24.2, "node-1", "decision", kind="wait", reason="node-1 leads: lost node-0")
    run.generation(24.5, "node-1", "node-2", causes=[(LOST, "node-0")])
    run.stop()
    told = objection(run)
    assert "fault 2 (kill_worker node-1): no later generation" in told
    assert "no event worker_failed" in told


def test_a_worker_that_dies_right_after_a_lost_node_may_go_unseen(run: MadeRun) -> None:
    """The agents may have noticed the loss first."""
    run.strike(20.0, "kill_node", "node-0")
    run.strike(20.3, "kill_worker", "node-1")
    run.generation(20.9, "node-1", "node-2", causes=[(LOST, "node-0")])
    run.stop()
    assert run.judged() == "1 faults told, 1 that nobody could see"


def test_the_event_of_a_worker_needs_an_agent_that_writes_it(run: MadeRun) -> None:
    """The node was lost a moment later: the cause tells both."""
    run.strike(20.0, "kill_worker", "node-1")
    run.strike(20.5, "kill_node", "node-1")
    run.generation(21.0, "node-0", "node-2", causes=[(LOST, "node-1")])
    run.stop()
    assert run.judged() == "2 faults told"


def test_a_node_that_was_replaced_has_to_tell(run: MadeRun) -> None:
    """That its agent was killed in an earlier generation excuses nothing."""
    run.strike(10.0, "kill_node", "node-1")
    run.generation(11.0, "node-0", "node-2", causes=[(LOST, "node-1")])
    run.generation(20.0, "node-0", "node-2", "node-1/2", causes=[(JOINED, "node-1")])
    run.strike(30.0, "kill_worker", "node-1", generation=3)
    run.generation(31.0, *NODES[::2], "node-1/2", causes=[(FAILED, "node-1")])
    run.stop()
    assert objection(run) == "fault 2 (kill_worker node-1): no event worker_failed of it"


def test_an_event_before_the_fault_does_not_tell_of_it(run: MadeRun) -> None:
    """It tells of an earlier one."""
    run.event(12.0, "node-1", "worker_failed", "warning", kind="signal")
    run.strike(20.0, "kill_worker", "node-1")
    run.generation(21.0, *NODES, causes=[(FAILED, "node-1")])
    run.stop()
    assert "no event worker_failed of it" in objection(run)


@pytest.mark.parametrize(("sample", "told"), [(SIGNALLED, True), ("", False)])
def test_a_sample_is_asked_of_an_agent_that_was_scraped_afterwards(
    sample: str, told: bool, run: MadeRun
) -> None:
    """Without the scrape nothing is asked: the agent may have been lost."""
    run.strike(20.0, "kill_worker", "node-1")
    run.event(20.2, "node-1", "worker_failed", "warning", kind="signal")
    run.generation(21.0, *NODES, causes=[(FAILED, "node-1")])
    run.stop()
    assert run.judged() == "1 faults told"
    run.scrape(20.1, "node-1")
    assert run.judged() == "1 faults told"
    run.scrape(20.5, "node-1", *filter(None, [sample]))
    if told:
        assert run.judged() == "1 faults told"
    else:
        assert 'no elastic_pt_worker_failures_total{cause="signal"} of it' in objection(run)


def test_a_sample_that_rose_before_the_fault_does_not_tell_of_it(run: MadeRun) -> None:
    """Counters never fall, so their value alone says nothing."""
    run.strike(20.0, "notice", "node-1", lead_s=30)
    run.event(20.2, "node-1", "notice", "warning")
    run.generation(21.0, "node-0", "node-2", causes=[(LEFT, "node-1")])
    run.stop()
    run.scrape(12.0, "node-1", "elastic_pt_notices_total 1.0")
    run.scrape(20.5, "node-1", "elastic_pt_notices_total 1.0")
    assert "no elastic_pt_notices_total of it" in objection(run)
    run.scrape(20.9, "node-1", "elastic_pt_notices_total 2.0")
    assert run.judged() == "1 faults told"


def test_an_error_in_an_agent_is_told_by_some_event(run: MadeRun) -> None:
    """A deed of a worker that an agent does: an upload that fails, or the agent that ends."""
    run.strike(20.0, "worker_raises", "node-1", phase="upload", by_agent=True)
    run.stop()
    assert "its agent tells of no trouble, and is not lost" in objection(run)
    run.event(20.1, "node-1", "failpoint", "warning")
    assert "its agent tells of no trouble" in objection(run)
    run.event(20.2, "node-1", "upload_failed", "error")
    assert run.judged() == "1 faults told"


def test_an_agent_that_ends_through_such_a_deed_is_lost(run: MadeRun) -> None:
    """It cannot write an event."""
    run.strike(20.0, "worker_segfaults", "node-1", phase="upload", by_agent=True)
    run.generation(21.0, "node-0", "node-2", causes=[(LOST, "node-1")])
    run.stop()
    assert run.judged() == "1 faults told"


# ---- events, samples, answers ------------------------------------------------------------------------


def test_a_notice_needs_its_event_also_of_a_node_that_is_no_member(run: MadeRun) -> None:
    """Its agent lives, and reads the notice."""
    run.event(18.0, "node-3", "agent_started")
    run.strike(20.0, "notice", "node-3", lead_s=30)
    run.stop()
    assert "no event notice of it" in objection(run)


def test_a_notice_to_an_agent_that_ends_at_once_needs_no_event(run: MadeRun) -> None:
    """It had no time to read it."""
    run.strike(20.0, "notice", "node-1", lead_s=30)
    run.strike(20.1, "kill_node", "node-1")
    run.generation(21.0, "node-0", "node-2", causes=[(LOST, "node-1")])
    run.stop()
    assert run.judged() == "2 faults told"


@pytest.mark.parametrize(("for_s", "seen"), [(0.5, False), (1.5, True)])
def test_a_notice_that_is_withdrawn_at_once_goes_unseen(
    for_s: float, seen: bool, run: MadeRun
) -> None:
    """Notices are read twice in a second."""
    run.strike(20.0, "notice_withdrawn", "node-1", for_s=for_s)
    run.stop()
    if seen:
        assert "no event notice of it" in objection(run)
    else:
        assert run.judged() == "0 faults told, 1 that nobody could see"


def test_why_an_agent_failed_is_read_in_the_run(run: MadeRun) -> None:
    """The command tells it in its own words, so no event is in the node's log."""
    run.strike(20.0, "other_code", "node-3")
    run.event(25.0, "node-3", "agent_started")
    run.stop()
    assert "no event agent_failed of it" in objection(run)
    run.shipped_event(26.0, "node-3", "agent_failed")
    assert run.judged() == "1 faults told"


RETRIED = 'elastic_pt_store_requests_total{operation="write",result="transient"}'


def test_a_fault_of_the_bucket_needs_an_event_and_a_sample_of_any_node(run: MadeRun) -> None:
    """Workers write such events, too, and do not count."""
    run.strike(20.0, "bucket_away", for_s=8.0)
    run.stop()
    assert "no event store_retry of it" in objection(run)
    run.event(21.0, "node-2", "store_retry", "warning")
    assert run.judged() == "1 faults told"
    run.scrape(19.0, "node-0", f"{RETRIED} 0.0")
    run.scrape(31.0, "node-0", f"{RETRIED} 0.0")
    assert 'no elastic_pt_store_requests_total{result="transient"} of it' in objection(run)
    run.scrape(31.5, "node-0", f"{RETRIED} 3.0")
    assert run.judged() == "1 faults told"


def test_slow_requests_are_told_by_a_histogram(run: MadeRun) -> None:
    """Some value is above a bound that it would not reach otherwise."""
    name = "elastic_pt_store_request_seconds_bucket"
    run.strike(20.0, "slow_bucket", for_s=8.0)
    run.stop()
    low, all_of = f'{name}{{le="0.1",operation="read"}}', f'{name}{{le="+Inf",operation="read"}}'
    run.scrape(19.0, "node-0", f"{low} 5.0", f"{all_of} 6.0")
    run.scrape(30.0, "node-0", f"{low} 9.0", f"{all_of} 10.0")
    assert "no elastic_pt_store_request_seconds" in objection(run)
    run.scrape(30.5, "node-0", f"{low} 9.0", f"{all_of} 11.0")
    assert run.judged() == "1 faults told"


def test_a_full_disk_is_told_if_workers_start_meanwhile(run: MadeRun) -> None:
    """Workers that run have their room."""
    run.strike(20.0, "staging_full", "node-1", for_s=10.0)
    run.stop()
    assert run.judged() == "0 faults told, 1 that nobody could see"
    del run.records[-1]
    run.strike(20.5, "kill_worker", "node-2")
    run.event(20.6, "node-2", "worker_failed", "warning", kind="signal")
    run.generation(21.0, *NODES, causes=[(FAILED, "node-2")])
    run.stop()
    assert "no event no_snapshots or worker_failed or workers_not_started" in objection(run)
    run.event(21.2, "node-1", "workers_not_started", "warning")
    assert run.judged() == "2 faults told"


def test_a_damaged_log_is_told_by_agents_that_start(run: MadeRun) -> None:
    """Those that run have read it already."""
    run.strike(20.0, "record_deleted")
    run.stop()
    assert run.judged() == "0 faults told, 1 that nobody could see"
    run.event(30.0, "node-3", "agent_started")
    run.strike(25.0, "join", "node-3")
    assert "no event agent_failed of it" in objection(run)


def test_a_pause_needs_an_answer(run: MadeRun) -> None:
    """The request is in the log anyway: the run of chaos wrote it."""
    run.strike(20.0, "operator_pauses", for_s=5.0)
    run.control(20.0, Verb.PAUSE)
    run.control(25.0, Verb.RESUME)
    run.stop()
    assert "no record that a pause is carried out" in objection(run)
    del run.records[-2:]
    run.control(22.0, Verb.PAUSE, done=True)
    run.generation(26.0, *NODES)
    run.stop()
    assert run.judged() == "1 faults told"


def test_a_pause_that_is_taken_back_at_once_needs_none(run: MadeRun) -> None:
    """It takes some seconds to reach it."""
    run.strike(20.0, "operator_pauses", for_s=2.0)
    run.control(20.0, Verb.PAUSE)
    run.stop()
    assert run.judged() == "0 faults told, 1 that nobody could see"


def test_a_request_for_a_checkpoint_is_answered_by_a_commit(run: MadeRun) -> None:
    """One that names it, not an earlier one."""
    run.strike(20.0, "operator_checkpoints")
    run.control(20.1, Verb.CHECKPOINT)
    run.commit(21.0, -1)
    run.stop()
    assert "no record that a checkpoint is carried out" in objection(run)
    run.commit(22.0, 1)
    assert run.judged() == "1 faults told"


# ---- causes without a fault --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LOST, LEFT, FAILED, PARKED, GAVE_UP, CauseKind.UNUSABLE])
def test_a_cause_without_a_fault_is_an_objection(kind: CauseKind, run: MadeRun) -> None:
    """Also the false alarm of a machine that stalls."""
    run.generation(20.0, "node-0", "node-2", causes=[(kind, "node-1")])
    run.stop()
    assert f"generation 2 has the cause {kind} of node-1" in objection(run)


def test_a_fault_has_its_cause_once(run: MadeRun) -> None:
    """The node that was started anew is lost again, and nothing struck it."""
    run.strike(20.0, "kill_node", "node-1")
    run.generation(21.0, "node-0", "node-2", causes=[(LOST, "node-1")])
    run.generation(25.0, "node-0", "node-2", "node-1/2", causes=[(JOINED, "node-1")])
    run.generation(30.0, "node-0", "node-2", causes=[(LOST, "node-1")])
    run.stop()
    assert objection(run) == ("generation 4 has the cause lost of node-1, which no fault explains")


@pytest.mark.parametrize(("noticed_at_s", "explained"), [(37.0, True), (40.0, False)])
def test_a_fault_that_has_healed_explains_what_was_noticed_by_then(
    noticed_at_s: float, explained: bool, run: MadeRun
) -> None:
    """A silence that began before the end may be noticed for the time of a silence after it."""
    run.strike(20.0, "node_freezes", "node-1", for_s=12.0)
    run.generation(25.0, "node-0", "node-2", causes=[(LOST, "node-1")], agree_s=0.5)
    run.generation(33.0, *NODES, causes=[(JOINED, "node-1")])
    run.generation(42.0, "node-0", "node-2", causes=[(LOST, "node-1")], agree_s=42.0 - noticed_at_s)
    run.stop()
    if explained:
        assert run.judged() == "1 faults told"
    else:
        assert "generation 4 has the cause lost of node-1" in objection(run)


def test_members_that_gave_up_are_not_those_that_were_silent(run: MadeRun) -> None:
    """All answer again before the next generation: it names who had found the silence."""
    run.strike(20.0, "node_freezes", "node-1", for_s=5.0)
    run.generation(25.5, *NODES, causes=[(GAVE_UP, "node-0"), (GAVE_UP, "node-2")], agree_s=1.0)
    run.stop()
    assert run.judged() == "1 faults told"


def test_members_that_give_up_while_a_node_is_silent_have_to_miss_it(run: MadeRun) -> None:
    """It does not answer, so it is lost."""
    run.strike(20.0, "node_freezes", "node-1", for_s=12.0)
    run.generation(25.5, *NODES, causes=[(GAVE_UP, "node-0"), (GAVE_UP, "node-2")], agree_s=1.0)
    run.stop()
    assert "no later generation has the cause" in objection(run)


def test_a_member_does_not_join(run: MadeRun) -> None:
    """`joined` is of a node that the generation before did not have."""
    run.strike(20.0, "kill_node", "node-1")
    run.generation(21.0, "node-0", "node-2", causes=[(LOST, "node-1"), (JOINED, "node-2")])
    run.stop()
    assert "the cause joined of node-2, which no fault explains" in objection(run)


def test_a_node_is_kept_out_only_after_failures(run: MadeRun) -> None:
    """Its own ones, in this log."""
    run.strike(20.0, "kill_node", "node-2")
    run.generation(21.0, "node-0", causes=[(LOST, "node-2"), (CauseKind.BARRED, "node-1")])
    run.stop()
    assert "the cause kept out of node-1" in objection(run).replace("barred", "kept out")


def test_a_generation_without_a_cause_follows_a_pause(run: MadeRun) -> None:
    """Otherwise nobody knows why it began."""
    run.generation(20.0, *NODES)
    run.stop()
    assert objection(run) == "generation 2 has no cause"


def test_new_members_alone_follow_a_loss_of_all(run: MadeRun) -> None:
    """Members that nothing struck do not vanish."""
    run.strike(20.0, "kill_node", "node-0", "node-1")
    run.generation(30.0, *(f"{node}/2" for node in NODES))
    run.stop()
    assert "generation 2 has new members only, though no fault struck node-2" in objection(run)


def test_a_bug_of_an_agent_is_an_objection(run: MadeRun) -> None:
    """Unless a fault raised the error in it."""
    run.event(20.0, "node-1", "notices_crashed", "error")
    run.stop()
    assert objection(run) == "node-1 has the event notices_crashed, which is a bug"


def test_metrics_count_what_the_node_has_appended(run: MadeRun) -> None:
    """Another cause than in the record is an objection."""
    run.strike(20.0, "kill_node", "node-1")
    run.generation(21.0, "node-0", "node-2", causes=[(LOST, "node-1")])
    run.stop()
    run.scrape(30.0, "node-0", 'elastic_pt_changes_total{cause="left"} 1.0')
    told = objection(run)
    assert 'node-0 shows elastic_pt_changes_total{cause="lost"} = 0, expected 1' in told
    assert 'node-0 shows elastic_pt_changes_total{cause="left"} = 1, expected 0' in told


@pytest.mark.parametrize(("shown", "passes"), [(2, True), (0, False), (3, False)])
def test_metrics_count_the_lost_steps_of_the_log(shown: int, passes: bool, run: MadeRun) -> None:
    """Those of the generations that the node has appended."""
    run.strike(20.0, "kill_node", "node-1")
    run.generation(21.0, "node-0", "node-2", causes=[(LOST, "node-1")], lost=2)
    run.scrape(
        30.0,
        "node-0",
        f"elastic_pt_lost_steps_total {shown}.0",
        'elastic_pt_changes_total{cause="lost"} 1.0',
    )
    run.stop()
    if passes:
        run.judged()
    else:
        assert f"lost_steps_total = {shown}, expected 2" in objection(run)


@pytest.mark.parametrize(("shown", "passes"), [(0, False), (1, True), (3, True), (4, False)])
def test_metrics_count_the_commits_of_the_log(shown: int, passes: bool, run: MadeRun) -> None:
    """Each that came before the newest record of a second before the scrape, and no more than there are."""
    for at_s in (10.0, 20.0, 29.5):
        run.commit(at_s, -1)
    run.stop()
    run.scrape(30.0, "node-0", f"elastic_pt_checkpoint_commits_total {shown}.0")
    if passes:
        run.judged()
    else:
        told = objection(run)
        assert (
            told == f"node-0 shows elastic_pt_checkpoint_commits_total = {shown}, expected 1 to 3"
        )


@pytest.mark.parametrize(("kind", "told"), [("shard_cut", False), ("operator_checkpoints", True)])
def test_a_quarantine_follows_a_damage(kind: str, told: bool, run: MadeRun) -> None:
    """A checkpoint that cannot be used, though nothing has damaged it, was committed too early."""
    run.strike(39.0, kind)
    run.stop()
    append(run.records, 40.0, Quarantine("ckpt/6", "a shard is missing"))
    append(run.records, 41.0, Quarantine("", "it fails", node="node-1"))
    expected = "record 2 quarantines ckpt/6, which no fault explains"
    assert (expected in objection(run)) is told
    assert "record 3" not in objection(run)


def test_a_killed_worker_that_is_told_as_one_that_exited_is_an_objection(run: MadeRun) -> None:
    """The event says how it ended, also if no metrics were read afterwards."""
    run.strike(20.0, "kill_worker", "node-1")
    run.event(20.1, "node-1", "worker_failed", "warning", kind="exit")
    run.generation(21.0, *NODES, causes=[(FAILED, "node-1")])
    run.stop()
    assert "no event worker_failed of it" in objection(run)


@pytest.mark.parametrize("told", [True, False])
def test_a_worker_may_fail_as_it_reads_from_a_node_that_is_lost(told: bool, run: MadeRun) -> None:
    """Its node is not to blame: the loss beside it explains the failure, and only that loss does."""
    run.strike(20.0, "kill_node", "node-1")
    detail = (
        f"worker 0 raised StoreError: http://127.0.0.1:{1 if told else 2}/v1/snapshots/1: reset"
    )
    run.generation(21.0, "node-0", "node-2", causes=[(LOST, "node-1"), (FAILED, "node-2", detail)])
    run.stop()
    if told:
        run.judged()
    else:
        assert "has the cause failed of node-2, which no fault explains" in objection(run)
