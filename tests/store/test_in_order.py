"""Reading several objects at once keeps the order, the bound and the place of an error."""

from collections.abc import Iterator

import pytest

from elastic_pt.store.parallel import in_order


def test_error_comes_in_its_place() -> None:
    """An error of the items, or of the work on one, comes after the results of all items before it."""

    def items() -> Iterator[int]:
        yield from (1, 2, 4)
        raise ValueError("no more")

    found: list[float] = []
    with pytest.raises(ValueError, match="no more"):
        found.extend(in_order(items(), lambda item: 8 / item, 8))
    assert found == [8.0, 4.0, 2.0]
    found.clear()
    with pytest.raises(ZeroDivisionError):
        found.extend(in_order([1, 2, 0, 4], lambda item: 8 / item, 8))
    assert found == [8.0, 4.0]


def test_items_are_taken_a_few_ahead() -> None:
    """Of any number of items, no more than `threads` are taken before the consumer has their results."""
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    for consumed, result in enumerate(in_order(items(), lambda item: item, 4)):
        assert result == consumed
        assert len(taken) <= consumed + 4
    assert len(taken) == 100
