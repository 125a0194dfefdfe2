"""Reading, computing and writing at the same time: what surrounds a loop goes on in threads beside it.

OpenCV decodes, encodes and resizes without holding Python's lock, and so does torch compute.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

Item = TypeVar("Item")
BUDGET_BYTES = 256 << 20  # of pictures that wait, whatever their size; at least one always may


def read_ahead(items: Iterable[Item], size_of: Callable[[Item], int], depth: int) -> Iterator[Item]:
    """The items in their order, up to `depth` of them made ahead of their use by a thread.

    size_of: an item's bytes. Fewer wait where they are large. An error of the iterable is raised here, in
    its turn.
    """
    iterator, end = iter(items), object()
    waiting: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(1) as reader:
        waiting.append(reader.submit(next, iterator, end))
        while True:
            item = waiting.popleft().result()
            if item is end:
                return
            while len(waiting) < _places(size_of(item), depth):
                waiting.append(reader.submit(next, iterator, end))
            yield item


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


class Behind:
    """Does work in a thread, one piece after the other, while the caller goes on; use it in a `with` block.

    An error of the work is raised by a later call, or at the end of the block.
    """

    def __init__(self, depth: int) -> None:
        """`depth`: pieces that may wait; a further call waits for the first of them."""
        self.depth = depth
        self._waiting: deque[Future[None]] = deque()
        self._worker = ThreadPoolExecutor(1)

    def __call__(self, work: Callable[[], None], size: int = 0) -> None:
        """Puts work in line; `size` is how many bytes it holds."""
        while len(self._waiting) >= _places(size, self.depth):
            self._waiting.popleft().result()
        self._waiting.append(self._worker.submit(work))

    def __enter__(self) -> Behind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while kind is None and self._waiting:
                self._waiting.popleft().result()
        finally:
            # After an error what is in line is still done: it belongs to what went well.
            self._worker.shutdown()


def _places(size: int, depth: int) -> int:
    return max(min(depth, BUDGET_BYTES // max(size, 1)), 1)
