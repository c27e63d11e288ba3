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


def test_a_sample_is_found_without_the_labels_that_are_left_out() -> None:
    """In any order; other values of a label are others."""
    counters = Counters()
    counters.take("a", 'elastic_pt_x_total{node="a",operation="read",result="ok",run="r"} 2.0', 1.0)
    assert counters.total('elastic_pt_x_total{result="ok"}') == 2.0
    assert counters.total('elastic_pt_x_total{result="ok",operation="read"}', "a") == 2.0
    assert counters.total('elastic_pt_x_total{result="failed"}') == 0.0


def test_a_sample_has_risen_when_it_was_higher_than_before() -> None:
    """A scrape that shows the same value is no rise, and a new agent starts at zero."""
    counters = Counters()
    for at_s, started_s, value in ((1.0, 5.0, 0), (2.0, 5.0, 3), (3.0, 5.0, 3), (4.0, 6.0, 0)):
        text = f"process_start_time_seconds {started_s}\nelastic_pt_x_total {value}.0"
        counters.take("a", text, at_s)
    assert counters.rose_at_s("elastic_pt_x_total", "a") == 2.0
    assert counters.rose_at_s("elastic_pt_x_total", "b") == 0.0


def test_values_above_a_bound_are_counted() -> None:
    """The buckets of a histogram count what is below."""
    counters = Counters()
    buckets = (("0.1", 4.0), ("1.0", 9.0), ("+Inf", 10.0))
    lines = [f'elastic_pt_s_bucket{{le="{bound}",node="a"}} {count}' for bound, count in buckets]
    counters.take("a", "\n".join(lines), 1.0)
    assert counters.total('elastic_pt_s{above="0.1"}') == 6.0
    assert counters.total('elastic_pt_s{above="1.0"}') == 1.0
