"""Fine-tuning that is killed and resumed, and by two processes: real ones, see forked_finetuning.py."""

import itertools
import os
from pathlib import Path

import pytest
import torch
from forked_runs import report_of
from safetensors.torch import load_file

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")

from flowpolicy import FlowPolicy
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.runs.loggers import read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked, which this system cannot"),
]


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory, forking_python):
    """The folder in which both happened, and the report."""
    folder = tmp_path_factory.mktemp("finetuning")
    return folder, report_of(forking_python, Path(__file__).with_name("forked_finetuning.py"), folder)


@pytest.mark.parametrize(("run", "kills", "steps"), [("run", 5, 4_096), ("offpolicy", 2, 2_560)])
def test_a_run_killed_at_random_moments_loses_at_most_an_iteration_each(finetuned, run, kills, steps):
    folder, report = finetuned
    saved = report[run]["saved"]
    assert len(saved) == kills
    assert saved == sorted(saved)
    assert saved[-1] > saved[min(1, kills - 2)]
    assert report[run]["steps"] >= steps
    steps = [row["step"] for row in read_metrics(folder / run / "metrics.csv")]
    assert steps == sorted(set(steps))  # no iteration twice, none missing
    assert max(later - earlier for earlier, later in itertools.pairwise(steps)) <= 128
    policy = FlowPolicy.load(folder / run / "checkpoint")
    assert policy.config.tuned == SamplerSpec(num_steps=2, solver="euler")
    assert policy.act(torch.zeros(1, 1, 3)).shape == (1, 4, 1)
    assert not [item for item in (folder / run).iterdir() if ".tmp-" in item.name]


def test_two_processes_take_the_step_of_one(finetuned):
    folder, _ = finetuned
    one, first, second = (load_file(folder / name) for name in ("one-0", "two-0", "two-1"))
    gradients = [name for name in one if name.startswith("gradient.")]
    assert any(name.startswith("gradient.critic") for name in gradients)
    assert any(name.startswith("gradient.flow.noise") for name in gradients)
    for name in gradients:
        assert torch.equal(first[name], second[name]), name
        assert (first[name] - one[name]).abs().max() < 1e-5 * max(1.0, one[name].abs().max()), name
    # Afterwards both learned from all four environments, two each, and stayed one policy.
    for name in [name for name in one if name.startswith("learned.")]:
        assert torch.equal(first[name], second[name]), name
    assert torch.equal(first["count"], second["count"])
    assert first["count"][0] == one["count"][0]
