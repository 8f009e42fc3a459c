"""An environment that plays several tasks gets its figures for each, wherever figures are given."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from toys import ToyPolicy, toy_task

from flowpolicy.evaluation.result import EvaluationResult, concatenate
from flowpolicy.evaluation.rollout import evaluate
from flowpolicy.evaluation.statistics import wilson_interval
from flowpolicy.evaluation.sweep import format_tasks
from flowpolicy.plots.evaluation import plot_tasks

SEVERAL = toy_task(env_kwargs={"several": True})


@pytest.fixture(scope="module")
def result() -> EvaluationResult:
    return evaluate(ToyPolicy(), SEVERAL, episodes=15, seed=30, num_envs=4)


def test_each_task_has_the_figures_of_its_own_episodes(result: EvaluationResult) -> None:
    found = result.metrics()["by_task"]
    assert list(found) == ["even", "odd"]
    for name, first in (("even", 30), ("odd", 31)):
        rows = np.flatnonzero(result.seeds % 2 == first % 2)
        row = found[name]
        assert row["episodes"] == len(rows) == (8 if name == "even" else 7)
        assert row["return_mean"] == pytest.approx(result.returns[rows].mean())
        hits = int(result.success[rows].sum())
        assert row["success_rate"] == pytest.approx(hits / len(rows))
        assert row["success_ci95"] == pytest.approx(list(wilson_interval(hits, len(rows))))
    assert found["even"]["success_rate"] != found["odd"]["success_rate"]


def test_logs_episodes_and_text_name_the_task(result: EvaluationResult, tmp_path: Path) -> None:
    found = result.metrics()["by_task"]
    assert result.scalars()["evaluation/success/odd"] == found["odd"]["success_rate"]
    with result.write_csv(tmp_path / "episodes.csv").open() as stream:
        tasks = [row["task"] for row in csv.DictReader(stream)]
    assert tasks == ["even" if seed % 2 == 0 else "odd" for seed in range(30, 45)]
    lines = format_tasks(found).splitlines()
    assert f"{found['odd']['success_rate']:.3f}" in next(line for line in lines if "odd" in line)
    mean = (found["even"]["success_rate"] + found["odd"]["success_rate"]) / 2
    assert f"{mean:.3f}" in lines[-1]


def test_parts_of_an_evaluation_keep_their_tasks(result: EvaluationResult) -> None:
    parts = [
        evaluate(ToyPolicy(), SEVERAL, episodes=count, seed=seed, num_envs=2)
        for seed, count in ((30, 4), (34, 11))
    ]
    assert concatenate(parts).task.tolist() == result.task.tolist()


def test_one_task_alone_has_no_such_figures(tmp_path: Path) -> None:
    alone = evaluate(ToyPolicy(), toy_task(), episodes=3, num_envs=3)
    assert alone.task is None
    assert alone.metrics()["by_task"] is None
    assert not any(key.startswith("evaluation/success/") for key in alone.scalars())
    with alone.write_csv(tmp_path / "episodes.csv").open() as stream:
        assert "task" not in next(csv.reader(stream))


def test_the_bars_are_drawn(result: EvaluationResult, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = plot_tasks(result.metrics()["by_task"], tmp_path / "tasks.png", title="toy")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
