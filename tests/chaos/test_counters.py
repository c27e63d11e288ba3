"""The counters that a chaos run keeps of its agents."""

from elastic_pt.chaos.scrape import Counters

TEXT = """
process_start_time_seconds {started}
elastic_pt_notices_total{{kind="preempt",node="a",run="r",source="file"}} {count}
elastic_pt_notices_total{{kind="risk",node="a",run="r",source="file"}} 1.0
elastic_pt_steps_total{{node="a",run="r"}} 7.0
elastic_pt_notices_total_more{{node="a",run="r"}} 50.0
"""


def test_a_sample_is_summed_over_agents_and_over_labels_that_it_does_not_name() -> None:
    """The newest answer of each agent counts, also of one that has ended; run and node are no labels of their own."""
    counters = Counters()
    counters.take("a", TEXT.format(started=1.0, count=2.0), 10.0)
    counters.take("a", TEXT.format(started=1.0, count=3.0), 11.0)
    counters.take("a", TEXT.format(started=9.0, count=1.0), 12.0)
    counters.take("b", TEXT.format(started=5.0, count=4.0), 13.0)
    assert counters.total('elastic_pt_notices_total{kind="preempt",source="file"}', "a") == 4.0
    assert counters.total("elastic_pt_notices_total", "a") == 6.0
    assert counters.total("elastic_pt_notices_total") == 11.0
    assert counters.total("elastic_pt_steps_total", "b") == 7.0
    assert counters.total("elastic_pt_absent_total") == 0.0
    assert counters.scraped_at_s == {"a": 12.0, "b": 13.0}
