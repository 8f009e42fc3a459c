"""Training that is killed and resumed, and by two processes: real ones, see forked_pretraining.py."""

import os
from pathlib import Path

import pytest
from forked_pretraining import POLICIES
from forked_runs import report_of
from safetensors.torch import load_file

from flowpolicy import FlowPolicy
from flowpolicy.runs.loggers import read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked, which this system cannot"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, forking_python):
    """The folder in which both happened, and the report."""
    folder = tmp_path_factory.mktemp("training")
    return folder, report_of(forking_python, Path(__file__).with_name("forked_pretraining.py"), folder)


def test_a_run_killed_at_seven_random_moments_ends_where_the_unbroken_one_does(trained):
    folder, report = trained
    assert len(report["steps"]) == 7
    assert report["steps"] == sorted(report["steps"])
    assert len({step for step in report["steps"] if step > 0}) >= 4  # killed at different stages
    assert report["loaded"] >= 4
    for name in (
        "training_state/state.safetensors",
        "checkpoint/model.safetensors",
        "checkpoint/config.json",
    ):
        assert (folder / "broken" / name).read_bytes() == (folder / "unbroken" / name).read_bytes()
    logged = [
        [row["step"] for row in read_metrics(folder / run / "metrics.csv")] for run in ("broken", "unbroken")
    ]
    assert logged[0] == logged[1]
    FlowPolicy.load(folder / "broken" / "checkpoint")


def test_two_processes_train_as_one_does(trained):
    folder, _ = trained
    for policy in POLICIES:
        one, first, second = (load_file(folder / f"{policy}-{run}") for run in ("one-0", "two-0", "two-1"))
        assert one.keys() == first.keys()
        for name, tensor in one.items():
            assert (first[name] == second[name]).all()
            assert (first[name] - tensor).abs().max() < 1e-5, name
        assert one["live.output.weight"].abs().max() > 1e-3  # it was zero: eight steps moved it this far
