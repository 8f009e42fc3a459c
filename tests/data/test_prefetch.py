"""Steps made ahead are the steps asked for."""

import threading

import pytest

from flowpolicy.data.prefetch import Prefetcher, read_ahead


def test_every_step_is_made_once_and_in_another_thread():
    made = []

    def make(step):
        made.append((step, threading.current_thread() is threading.main_thread()))
        return step * step

    prefetcher = Prefetcher(make, last=9)
    assert [prefetcher(step) for step in range(9)] == [step * step for step in range(9)]
    prefetcher.close()
    assert made == [(step, False) for step in range(9)]


def test_steps_may_be_left_out_and_asked_for_again():
    prefetcher = Prefetcher(lambda step: -step, last=100)
    assert [prefetcher(step) for step in (0, 1, 7, 8, 3, 3)] == [0, -1, -7, -8, -3, -3]
    prefetcher.close()


def test_an_error_is_raised_at_its_step():
    def make(step):
        if step == 2:
            raise ValueError("broken")
        return step

    prefetcher = Prefetcher(make, last=9)
    assert [prefetcher(0), prefetcher(1)] == [0, 1]
    with pytest.raises(ValueError, match="broken"):
        prefetcher(2)
    prefetcher.close()


def test_items_are_read_a_few_ahead_in_order_and_their_errors_come_in_their_place():
    read = []

    def items():
        for number in range(20):
            read.append(number)
            yield number
        raise ValueError("broken")

    ahead = read_ahead(items(), ahead=2)
    for number in range(20):
        assert next(ahead) == number
        assert len(read) <= number + 1 + 3
    with pytest.raises(ValueError, match="broken"):
        next(ahead)


def test_reading_ahead_can_be_left():
    ahead = read_ahead(iter(range(10**9)))
    assert [next(ahead), next(ahead)] == [0, 1]
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]
