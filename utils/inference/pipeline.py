"""Reading, computing and writing at the same time: what surrounds a loop goes on in threads beside it.

OpenCV decodes, encodes and resizes without holding Python's lock, and so does torch compute.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

from utils.datasets.workers import abandonable

Item = TypeVar("Item")
Result = TypeVar("Result")
BUDGET_BYTES = 256 << 20  # of images that wait, whatever their size; at least one always may


def read_ahead(items: Iterable[Item], size_of: Callable[[Item], int], depth: int) -> Iterator[Item]:
    """The items in their order, up to `depth` of them made ahead of their use by a thread.

    size_of: an item's bytes. Fewer wait where they are large. An error of the iterable is raised here, in
    its turn.
    """
    iterator, end = iter(items), object()
    waiting: deque[Future[Any]] = deque()
    with abandonable(ThreadPoolExecutor(1)) as reader:
        waiting.append(reader.submit(next, iterator, end))
        while True:
            item = waiting.popleft().result()
            if item is end:
                return
            while len(waiting) < _places(size_of(item), depth):
                waiting.append(reader.submit(next, iterator, end))
            yield item


def worked_ahead(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    size_of: Callable[[Result], int],
    depth: int,
    threads: int,
    size_of_item: Callable[[Item], int] = lambda _: 0,
) -> Iterator[Result]:
    """The results of work on items in their order, up to `depth` of them ahead of their use.

    Several threads work, and one more makes the items. size_of, size_of_item: bytes of a result and of an
    item, as in `read_ahead`. An error is raised here, in its turn.
    """
    waiting: deque[Future[Result]] = deque()
    places = 1
    with abandonable(ThreadPoolExecutor(threads)) as pool:
        for item in read_ahead(items, size_of_item, threads + 1):
            waiting.append(pool.submit(work, item))
            while len(waiting) >= places:
                result = waiting.popleft().result()
                places = _places(size_of(result), depth)
                yield result
        while waiting:
            yield waiting.popleft().result()


def in_groups(items: Iterable[Item], key: Callable[[Item], Any], most: int) -> Iterator[list[Item]]:
    """Runs of neighbours with an equal key, `most` items long at most."""
    group: list[Item] = []
    for item in items:
        if group and (len(group) == most or key(item) != key(group[0])):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


Rest = Callable[[], None]  # what any thread may do, in any order


class Behind:
    """Does work in a thread, one piece after the other, while the caller goes on; use it in a `with` block.

    What a piece gives back, if anything, is the rest of it, which several threads see to. An error of the
    work is raised by a later call, or at the end of the block.
    """

    def __init__(self, depth: int, threads: int = 1) -> None:
        """`depth`: pieces that may wait; a further call waits for the first of them."""
        self.depth = depth
        self._waiting: deque[Future[Future[None] | None]] = deque()
        self._first, self._others = ThreadPoolExecutor(1), ThreadPoolExecutor(threads)

    def __call__(self, work: Callable[[], Rest | None], size: int = 0) -> None:
        """Puts work in line; `size` is how many bytes it holds."""
        while len(self._waiting) >= _places(size, self.depth):
            self._finish_one()
        self._waiting.append(self._first.submit(self._begin, work))

    def _begin(self, work: Callable[[], Rest | None]) -> Future[None] | None:
        rest = work()
        return None if rest is None else self._others.submit(rest)

    def _finish_one(self) -> None:
        rest = self._waiting.popleft().result()
        if rest is not None:
            rest.result()

    def __enter__(self) -> Behind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while kind is None and self._waiting:
                self._finish_one()
        finally:
            # After an error what is in line is still done: it belongs to what went well.
            self._first.shutdown()
            self._others.shutdown()


def _places(size: int, depth: int) -> int:
    return max(min(depth, BUDGET_BYTES // max(size, 1)), 1)
