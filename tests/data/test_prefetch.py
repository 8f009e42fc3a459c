"""Steps made ahead are the steps asked for."""

import threading

import pytest

from flowpolicy.data.prefetch import Prefetcher


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
