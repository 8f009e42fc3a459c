"""The memory that a sampler takes on a GPU is its own, whatever ran before it."""

from types import SimpleNamespace

import pytest

from flowpolicy.acceleration import latency
from flowpolicy.flow.sampler_spec import SamplerSpec


def test_the_peak_of_an_earlier_sampler_is_forgotten(monkeypatch):
    held, peak = 100e6, 900e6  # bytes; the peak is of a sampler that is gone

    def reset(device):
        nonlocal peak
        peak = held

    def build(*arguments, **settings):
        nonlocal held, peak
        held += 30e6
        peak = max(peak, held)
        return SimpleNamespace(compute=None)

    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", reset)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: peak)
    monkeypatch.setattr(latency, "build_sampler", build)
    policy = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    timed = latency._Timed(policy, 1, SamplerSpec(num_steps=1, backend="eager"), None, 0)
    timed.warm_up([], None, 0)
    assert timed.memory == pytest.approx(30.0)
