"""Reads many objects at once, for a bucket that takes tens of milliseconds to answer each request."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    items: Iterable[Item], work: Callable[[Item], Result], threads: int
) -> Iterator[Result]:
    """`map` over a pool of threads. Takes at most `threads` items ahead of the consumer.

    An error comes where `map` would raise it: after the results of all items before it.
    """
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for future in _submitted(pool, items, work):
                waiting.append(future)
                if len(waiting) == threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _submitted(
    pool: ThreadPoolExecutor, items: Iterable[Item], work: Callable[[Item], Result]
) -> Iterator[Future[Result]]:
    """The work on each item. If `items` raises an error, the last future has it."""
    try:
        for item in items:
            yield pool.submit(work, item)
    except Exception as error:
        failed: Future[Result] = Future()
        failed.set_exception(error)
        yield failed
