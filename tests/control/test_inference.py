"""Threads and processes that plan: answers, exceptions, hangs, deaths and what follows each."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
from counting_planners import build_counting, build_nothing

from flowpolicy.control.clock import MonotonicClock
from flowpolicy.control.events import Event, EventLog
from flowpolicy.control.inference import ProcessWorker, Request, WorkerDiedError, build_worker
from flowpolicy.control.pipeline import Pipeline
from flowpolicy.errors import ConfigError, FlowPolicyError

OBSERVATION = {"observation": np.ones((1, 3), np.float32)}


@pytest.fixture(params=["thread", "process"])
def worker(request):
    made = build_worker(request.param, build_counting)
    assert made.ready(30.0)
    yield made
    made.close()


def test_each_request_has_its_answer(worker):
    assert worker.poll() is None
    for tick in (3, 4, 5):
        worker.submit(Request(tick, OBSERVATION))
        answer = worker.poll(5.0)
        assert (answer.tick, answer.error) == (tick, "")
        np.testing.assert_array_equal(answer.actions, np.full((4, 2), tick + 3))
        assert 0 < answer.seconds < 1


def test_an_exception_is_an_answer_in_one_line(worker):
    worker.submit(Request(-1, OBSERVATION))
    answer = worker.poll(5.0)
    assert answer.actions is None
    assert answer.error == "RuntimeError: out of"
    worker.submit(Request(1, OBSERVATION))
    assert worker.poll(5.0).actions is not None


def test_a_planner_that_cannot_be_built_says_why():
    for kind in ("thread", "process"):
        worker = build_worker(kind, build_nothing)
        with pytest.raises(WorkerDiedError, match="no such checkpoint"):
            worker.ready(30.0)
        pipeline = Pipeline(build_worker(kind, build_nothing), (4, 2), EventLog(), 1.0, MonotonicClock())
        with pytest.raises(FlowPolicyError, match="no such checkpoint"):
            pipeline.wait_until_ready(30.0)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'process'"):
        build_worker("proces", build_counting)


def wait_for(condition, seconds=20.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)


def test_a_hanging_worker_is_replaced_and_answers_again(worker):
    events = EventLog()
    pipeline = Pipeline(worker, (4, 2), events, 0.1, MonotonicClock())
    assert pipeline.idle
    pipeline.submit(1000, OBSERVATION, None)
    assert not pipeline.idle  # one at a time
    wait_for(lambda: pipeline.take(1, 0.0) is None and events.counts[Event.INFERENCE_HANG])
    assert pipeline.failed
    wait_for(lambda: pipeline.take(2, 0.0) is None and pipeline.idle)
    pipeline.submit(7, OBSERVATION, None)
    found = []
    wait_for(lambda: found.append(pipeline.take(8, 0.05)) or found[-1] is not None)
    actions, tick, _ = found[-1]
    assert tick == 7
    assert (actions == 10).all()
    assert events.counts[Event.INFERENCE_HANG] == 1


@pytest.mark.parametrize("how", ["exits", "killed"])
def test_a_process_that_ends_is_replaced(how):
    worker = ProcessWorker(build_counting)
    assert worker.ready(30.0)
    events = EventLog()
    pipeline = Pipeline(worker, (4, 2), events, 5.0, MonotonicClock())
    pid = worker.pid
    pipeline.submit(2000 if how == "exits" else 1000, OBSERVATION, None)
    if how == "killed":
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: pipeline.take(1, 0.0) is None and events.counts[Event.INFERENCE_DIED])
    wait_for(lambda: pipeline.take(2, 0.0) is None and pipeline.idle)
    pipeline.submit(7, OBSERVATION, None)
    wait_for(lambda: pipeline.take(3, 0.05) is not None)
    assert worker.pid != pid
    assert events.counts[Event.INFERENCE_DIED] == 1
    worker.close()
    worker.close()  # a second time does nothing
