"""A few of the random sequences that benchmarks/control_sequences.py runs by the hundred thousand."""

from __future__ import annotations

import pytest
from random_sequences import run_sequences

from flowpolicy.control.loop import ControlLoop
from flowpolicy.control.safety import SafetyGate

COUNT = 150


def test_no_sequence_of_faults_breaks_a_limit():
    assert run_sequences(0, COUNT) == []


def forget_what_was_sent(monkeypatch):
    send_safe = SafetyGate._send_safe

    def forgetting(self, tick):
        sent = send_safe(self, tick)
        self._sent = []
        return sent

    monkeypatch.setattr(SafetyGate, "_send_safe", forgetting)


def count_ticks_as_steps(monkeypatch):
    tick = ControlLoop._tick

    def counting(self, *arguments):
        before = self.status.steps
        tick(self, *arguments)
        self.status.steps = before + 1

    monkeypatch.setattr(ControlLoop, "_tick", counting)


def keep_chunks_at_a_take_over(monkeypatch):
    intervened = ControlLoop._intervened

    def keeping(self, *arguments):
        drop = self.chunks.drop
        self.chunks.drop = lambda: self._is_operated or drop()
        try:
            return intervened(self, *arguments)
        finally:
            self.chunks.drop = drop

    monkeypatch.setattr(ControlLoop, "_intervened", keeping)


@pytest.mark.parametrize("mutate", [forget_what_was_sent, count_ticks_as_steps, keep_chunks_at_a_take_over])
def test_a_mutation_is_caught(monkeypatch, mutate):
    mutate(monkeypatch)
    assert run_sequences(0, 60)
