"""Keeps the episodes of a control run as demonstrations, from a thread beside the loop."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.control.events import Event, EventLog
from flowpolicy.control.robot import Action
from flowpolicy.data.command_source import SAFE
from flowpolicy.data.keys import SOURCE, TICK
from flowpolicy.data.recording import RecordedStore
from flowpolicy.features import Feature
from flowpolicy.features.stored import KINDS

log = logging.getLogger(__name__)

MEMORY_BYTES = 1 << 28
"""Steps that wait for the disk take at most this much."""
AGAIN = "a later run with the same record= makes a store of the episodes that are on the disk."
SUCCEEDED, FAILED, UNFINISHED, INCOMPLETE = "success", "failure", "unfinished", "incomplete"
"""Marks of episodes, in the store's ``masks``: judged by the operator or the robot; cut off by the end of the
run; without the steps that the disk did not take."""


class Recorder:
    """Writes what the policy saw and what the robot was sent, a row a tick, into a new store.

    An episode begins with its first valid command, so that the wait for a first chunk is no part of it. Where
    the robot could be sent nothing, the command before it stands in the row, marked as a safe action. Of a
    robot that tells of rewards each row has the reward that followed its command, and whether the episode
    ended with it in a terminal state. The loop never waits for the disk: an episode of which more than
    :data:`MEMORY_BYTES` pile up is given up from there on, and marked.

    Args:
        path: of the store, a folder that does not exist yet.
        features: key -> feature, of the policy's observations.
        events: where lost steps are counted.
        attributes: of the store, such as ``env_id`` and ``fps``.

    Attributes:
        path: the finished store, after :meth:`close`; None where there is no episode.

    Raises:
        DataError: something stands at ``path``, or another program records there.
    """

    def __init__(
        self, path: Path | str, features: Mapping[str, Feature], events: EventLog,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        kinds = {key: feature.declaration() for key, feature in features.items()}
        self.path: Path | None = None
        self._store = RecordedStore(path, {**(attributes or {}), KINDS: kinds})
        self._events = events
        self._sent: Action | None = None  # in the present episode
        # The newest row, which waits for its reward, and all rewards before it.
        self._unrewarded: tuple[Callable[[float | None, bool], None], float | None] | None = None
        self._gave_up = False  # for the rest of this episode
        self._taken = self._written = 0  # bytes; each is changed by one thread alone
        self._problem = ""
        self._is_rewarded: bool | None = None  # whether rows have rewards, as the first one has
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, daemon=True, name="recorder")
        self._thread.start()

    def step(
        self, tick: int, observation: Mapping[str, NDArray[Any]], sent: Action | None, source: int,
        total_reward: float | None = None,
    ) -> None:  # fmt: skip
        """A tick: what was observed, what was sent and by whom, see :mod:`flowpolicy.data.command_source`.

        Args:
            tick: of the loop.
            observation: key -> ``shape``; it is kept, not copied.
            sent: ``(A,)``, or None where nothing could be.
            source: who was in command.
            total_reward: sum of all rewards before this command; None where the robot tells of none.
        """
        self._reward(total_reward)
        sent = self._sent if sent is None else sent
        if sent is None or (self._sent is None and source == SAFE) or self._gave_up:
            return
        self._sent = sent
        size = sent.nbytes + sum(value.nbytes for value in observation.values())
        if self._problem or self._taken - self._written + size > MEMORY_BYTES:
            self._gave_up = True
            self._events.add(Event.RECORDING_LOST, tick, self._problem or "the disk is too slow")
            return
        self._taken += size
        self._unrewarded = partial(self._append, tick, observation, sent, source, size), total_reward

    def _reward(self, total_reward: float | None, *, terminated: bool = False) -> None:
        """What followed the newest row is known."""
        if self._unrewarded is not None:
            append, before = self._unrewarded
            reward = None if total_reward is None or before is None else total_reward - before
            self._unrewarded = None
            self._queue.put(partial(append, reward, terminated))

    def end_episode(
        self, success: bool | None = None, total_reward: float | None = None, *, terminated: bool = False,
        finished: bool = True,
    ) -> None:  # fmt: skip
        """The episode is over; nothing happens where none has begun.

        Args:
            success: None where nobody knows.
            total_reward: sum of all rewards so far.
            terminated: whether it ended in a terminal state.
            finished: whether it came to its end.
        """
        if self._sent is None:
            return
        self._reward(total_reward, terminated=terminated)
        marks = [] if success is None else [SUCCEEDED if success else FAILED]
        marks += [] if finished else [UNFINISHED]
        marks += [INCOMPLETE] if self._gave_up else []
        self._sent, self._gave_up = None, False
        self._queue.put(partial(self._store.end_episode, tuple(marks)))

    def close(self) -> Path | None:
        """Finish the store; its path, or None where there is no episode. A second call does nothing.

        The episode under way is kept, marked as unfinished.
        """
        if not self._thread.is_alive():
            return None
        self.end_episode(finished=False)
        self._queue.put(None)
        self._thread.join()
        try:
            self.path = self._store.close()
        except Exception as error:  # the disk is full, most likely; what the run left besides matters too
            log.error("The recording could not be finished (%s); %s", error, AGAIN)
        return self.path

    def _write(self) -> None:
        while (work := self._queue.get()) is not None:
            if self._problem:
                continue
            try:
                work()
            except Exception as error:  # a full disk, most likely; the loop goes on without recording
                self._problem = f"{type(error).__name__}: {error}"[:200]
                log.error("Recording ended: %s", self._problem)

    def _append(
        self, tick: int, observation: Mapping[str, NDArray[Any]], sent: Action, source: int, size: int,
        reward: float | None, terminated: bool,
    ) -> None:  # fmt: skip
        rows = {key: value[None] for key, value in observation.items()}
        told: dict[str, NDArray[Any]] = {
            SOURCE: np.array([source], np.int8),
            TICK: np.array([tick], np.int64),
        }
        if self._is_rewarded is None:
            self._is_rewarded = reward is not None
        if self._is_rewarded:
            told |= {"reward": np.array([reward or 0.0], np.float32), "terminated": np.array([terminated])}
        self._store.append({**rows, "action": sent[None], **told})
        self._written += size
