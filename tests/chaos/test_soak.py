"""The judgement of a soak: what grows, and what is noise."""

import os

from chaos_tests.soak import MARGINS, Sample, growth, sample


def test_growth_compares_the_last_quarter_with_the_second() -> None:
    """What is higher at the start or for a moment is no growth; a leak is."""
    flat = [Sample(90, 20, 300.0, 9.0)] * 10 + [Sample(50, 15, 228.0, 8.5)] * 30
    assert all(last <= second + MARGINS[name] for name, (second, last) in growth(flat).items())
    leak = [Sample(50 + hour, 15, 228.0 + hour, 8.5) for hour in range(40)]
    assert growth(leak)["files"] == (64.5, 84.5)
    assert growth(leak)["threads"] == (15, 15)


def test_a_sample_reads_a_process() -> None:
    """It sees a file that is opened."""
    before = sample(os.getpid())
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
    after = sample(os.getpid())
    for each in opened:
        os.close(each)
    assert after.files - before.files == 3
    assert after.threads >= 1
    assert after.memory_mb > 10
