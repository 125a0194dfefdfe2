"""Overlap of reading, computing and writing, by running the work around a loop in other threads.

OpenCV releases the GIL while it decodes, encodes and resizes, and so does torch while it computes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

from utils.datasets.workers import cancel_on_error

Item = TypeVar("Item")
Result = TypeVar("Result")
BUDGET_BYTES = 256 << 20  # of queued images; one may always be queued, whatever its size


def read_ahead(items: Iterable[Item], size_of: Callable[[Item], int], depth: int) -> Iterator[Item]:
    """Yield the items in order, up to `depth` of them read ahead by a thread.

    size_of: returns the bytes of an item; fewer large items are read ahead. An exception of the iterable is
    raised here, in its turn.
    """
    iterator, end = iter(items), object()
    waiting: deque[Future[Any]] = deque()
    with cancel_on_error(ThreadPoolExecutor(1)) as reader:
        waiting.append(reader.submit(next, iterator, end))
        while True:
            item = waiting.popleft().result()
            if item is end:
                return
            while len(waiting) < _places(size_of(item), depth):
                waiting.append(reader.submit(next, iterator, end))
            yield item


def map_ahead(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    size_of: Callable[[Result], int],
    depth: int,
    threads: int,
    size_of_item: Callable[[Item], int] = lambda _: 0,
) -> Iterator[Result]:
    """Yield the results of work on items, in order, up to `depth` of them computed ahead.

    Several threads do the work, and one more reads the items. size_of, size_of_item: return the bytes of a
    result and of an item, as in `read_ahead`. An exception is raised here, in its turn.
    """
    waiting: deque[Future[Result]] = deque()
    places = 1
    with cancel_on_error(ThreadPoolExecutor(threads)) as pool:
        for item in read_ahead(items, size_of_item, threads + 1):
            waiting.append(pool.submit(work, item))
            while len(waiting) >= places:
                result = waiting.popleft().result()
                places = _places(size_of(result), depth)
                yield result
        while waiting:
            yield waiting.popleft().result()


def in_groups(items: Iterable[Item], key: Callable[[Item], Any], most: int) -> Iterator[list[Item]]:
    """Yield runs of consecutive items with equal keys, of at most `most` items."""
    group: list[Item] = []
    for item in items:
        if group and (len(group) == most or key(item) != key(group[0])):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


Continuation = Callable[[], None]  # may run in any thread, in any order


class BackgroundTasks:
    """Runs tasks in a background thread, one after the other; use it in a `with` block.

    A task may return a function, its remaining part, which one of several other threads runs. An exception of
    a task is raised by a later call, or at the end of the block.
    """

    def __init__(self, depth: int, threads: int = 1) -> None:
        """`depth`: tasks that may be queued; a call beyond that blocks until the oldest is done."""
        self.depth = depth
        self._waiting: deque[Future[Future[None] | None]] = deque()
        self._first, self._others = ThreadPoolExecutor(1), ThreadPoolExecutor(threads)

    def __call__(self, work: Callable[[], Continuation | None], size: int = 0) -> None:
        """Queue a task; `size` is the number of bytes it keeps in memory."""
        while len(self._waiting) >= _places(size, self.depth):
            self._finish_one()
        self._waiting.append(self._first.submit(self._begin, work))

    def _begin(self, work: Callable[[], Continuation | None]) -> Future[None] | None:
        rest = work()
        return None if rest is None else self._others.submit(rest)

    def _finish_one(self) -> None:
        rest = self._waiting.popleft().result()
        if rest is not None:
            rest.result()

    def __enter__(self) -> BackgroundTasks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while kind is None and self._waiting:
                self._finish_one()
        finally:
            # Even after an error queued tasks are completed: they belong to frames that succeeded.
            self._first.shutdown()
            self._others.shutdown()


def _places(size: int, depth: int) -> int:
    return max(min(depth, BUDGET_BYTES // max(size, 1)), 1)
