"""Work that is begun early, but not too early."""

import threading

import pytest

from flax_alexnet.data.prefetch import map_threads, prefetch


@pytest.mark.parametrize("count", [0, 1, 5])
def test_items_are_asked_for_so_many_early(count):
    asked = []

    def items():
        for number in range(4):
            asked.append(number)
            yield number

    received = []
    for number in prefetch(items(), count):
        assert len(asked) == min(4, len(received) + 1 + count)
        received.append(number)
    assert received == [0, 1, 2, 3]


def test_threads_give_results_in_order_and_no_more_than_twice_their_number_wait():
    begun, lock = [], threading.Lock()

    def square(number):
        with lock:
            begun.append(number)
        return number**2

    results = map_threads(square, range(100), threads=2)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    assert len(begun) <= 3 + 2 * 2
    assert list(results) == [number**2 for number in range(3, 100)]


def test_an_error_comes_at_its_place():
    results = map_threads(lambda number: 1 // number, [2, 1, 0, 3], threads=2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
