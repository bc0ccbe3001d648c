"""Starts work before its result is needed, with a limit on the results that wait."""

import collections
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def prefetch(items: Iterable[T], count: int = 2) -> Iterator[T]:
    """The items, each asked for `count` items early: so batches are on their way to the devices."""
    waiting: collections.deque[T] = collections.deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def map_threads(
    function: Callable[[S], T], items: Iterable[S], threads: int | None = None
) -> Iterator[T]:
    """`function` of each item, in order, computed by so many threads (None: one a core).

    At most two results a thread wait for whoever asks for them, where `Executor.map` keeps all.
    """
    threads = threads or os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        futures = (pool.submit(function, item) for item in items)
        for future in prefetch(futures, 2 * threads):
            yield future.result()
