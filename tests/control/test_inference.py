"""Threads and processes that plan: answers, exceptions, hangs, deaths and what follows each."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest
from control_toys import ToyClock, ToyPolicy, ToyRobot, encoded
from counting_inferences import BuiltAgain, build_counting, build_nothing

from flowpolicy.control.config import ControlConfig
from flowpolicy.control.events import Event, EventLog
from flowpolicy.control.inference import (
    Answer,
    Pipeline,
    Request,
    SparedWorker,
    WorkerDiedError,
    build_worker,
)
from flowpolicy.control.loop import ControlLoop
from flowpolicy.control.system import MonotonicClock
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
        assert (answer.step, answer.error) == (tick, "")
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
    worker = build_worker("process", build_counting)
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


def test_a_spare_works_at_once_and_is_built_as_its_predecessor_said():
    worker = build_worker("process", BuiltAgain)
    assert worker.ready(30.0)
    first = worker.pid
    for expected in (0, 1, 1):
        worker.submit(Request(0, OBSERVATION))
        assert (worker.poll(5.0).actions == expected).all()
        worker.restart()
        assert worker.ready()  # without any wait
        worker.ready(30.0)  # for the next spare
    assert worker.pid != first
    worker.close()


def test_a_spare_that_dies_while_it_waits_is_replaced():
    worker = build_worker("process", build_counting)
    assert worker.ready(30.0)
    spare = worker._stored[0].pid
    os.kill(spare, signal.SIGKILL)
    wait_for(lambda: worker.waiting == 2 and spare not in [host.pid for host in worker._stored])
    worker.restart()
    assert worker.ready()
    worker.submit(Request(3, OBSERVATION))
    assert worker.poll(5.0).actions is not None
    worker.close()


def test_no_call_of_a_worker_starts_a_planner_itself():
    callers = []

    class Host:
        again = None

        def __init__(self, build):
            callers.append(threading.current_thread())

        def built(self, timeout):
            return True

        def alive(self):
            return True

        def end(self, now=False):
            callers.append(threading.current_thread())

    worker = SparedWorker(Host, build_counting)
    assert worker.ready(5.0)
    worker.restart()
    assert worker.ready(5.0)
    wait_for(lambda: len(callers) == 5)  # four begun, one ended
    assert threading.current_thread() not in callers
    worker.close()


def test_what_was_given_up_is_ended_though_nothing_else_is_built_any_more():
    ended = []

    class Host(LosableHost):
        def built(self, timeout):
            time.sleep(min(timeout, 0.01))
            return len(hosts) < 3 or worker._closed  # the third takes until the end

        def __init__(self, build):
            super().__init__(build)
            hosts.append(self)

        def end(self, now=False):
            ended.append(self)

    hosts: list[Host] = []
    worker = SparedWorker(Host, build_counting, spares=1)
    assert worker.ready(5.0)
    worker.restart()
    wait_for(lambda: len(hosts) == 3 and hosts[0] in ended)
    worker.restart()
    worker.close()
    assert set(hosts) <= set(ended)


def test_closing_leaves_no_thread_that_could_be_inside_torch_when_the_program_ends():
    before = set(threading.enumerate())
    worker = build_worker("thread", build_counting)
    assert worker.ready(30.0)
    worker.submit(Request(3, OBSERVATION))
    worker.close()
    assert set(threading.enumerate()) <= before


class LosableHost:
    """Answers at once until it is lost: a killed one says so, a stopped one says nothing."""

    again, pid = None, 0

    def __init__(self, build):
        self.lost, self.request = "", None

    def submit(self, request):
        self.request = request

    def poll(self, timeout=0.0):
        if self.lost == "killed":
            raise WorkerDiedError("the inference process ended")
        if self.lost or self.request is None:
            return None
        request, self.request = self.request, None
        return Answer(request.step, encoded(request), 0.001)

    def built(self, timeout):
        time.sleep(0.01)  # a hundred ticks of the toy clock take less
        return True

    def alive(self):
        return True

    def end(self, now=False):
        pass


@pytest.mark.parametrize(("how", "ticks"), [("killed", [100]), ("killed", [100, 106]), ("stopped", [100])])
def test_a_loop_outlives_the_loss_of_its_planner_with_default_settings(how, ticks):
    worker, clock = SparedWorker(LosableHost, build_counting), ToyClock()
    assert worker.ready(5.0)
    robot = ToyRobot(clock)
    loop = ControlLoop(robot, ToyPolicy(), worker, ControlConfig(), clock=clock)

    def lose(action):
        if len(robot.commands) in ticks:
            worker._current.lost = how

    robot.on_act = lose
    assert loop.run(300).stopped == "finished"
    event = Event.INFERENCE_DIED if how == "killed" else Event.INFERENCE_HANG
    assert loop.events.counts[event] == len(ticks)
    # Killed, its spare answers in the next tick; stopped, it is waited for, a third of the watchdog.
    allowed = 2 * len(ticks) if how == "killed" else 60
    assert loop.events.counts[Event.SAFE_ACTION] <= 2 + allowed
    worker.close()


def test_a_stopped_process_does_not_hold_up_whoever_sends_it_an_image():
    worker = build_worker("process", build_counting)
    assert worker.ready(30.0)
    os.kill(worker.pid, signal.SIGSTOP)
    started = time.monotonic()
    worker.submit(Request(3, {"observation": np.zeros((1, 1000, 1000, 3), np.uint8)}))
    assert worker.poll() is None
    assert time.monotonic() - started < 1
    worker.close()


def test_a_hanging_policy_is_replaced_before_the_watchdog_speaks():
    period, left = 0.01, 4
    limit = ControlConfig().safety.miss_limit
    assert left * period < ControlConfig().hang_timeout(period, left) < (left + limit) * period
    assert ControlConfig(hang_timeout_s=0.5).hang_timeout(period, left) == 0.5
    with pytest.raises(ConfigError, match=r"hang_timeout_s is 2.* below 1.04 s, when the watchdog"):
        ControlConfig(hang_timeout_s=2.0).hang_timeout(period, left)
