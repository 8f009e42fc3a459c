"""The documented way from demonstrations to a robot, in a reduced size: four real scripts in a row."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

pytest.importorskip("mujoco", reason="mujoco is not installed")
pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")
pytest.importorskip("hydra", reason="hydra is not installed")


@pytest.mark.slow
def test_pretrain_finetune_plan_and_control(repo_root, tmp_path, forking_python):
    environment = {**os.environ, "SIZE": "small", "RUNS": str(tmp_path), "PYTHON": str(forking_python)}
    done = subprocess.run(
        ["bash", str(repo_root / "scripts" / "pretrain_to_robot.sh")],
        env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summaries = {
        step: json.loads((tmp_path / step / "summary.json").read_text())
        for step in ("pretrain", "finetune", "plan", "control")
    }
    assert summaries["control"]["metrics"]["stopped"] == "finished"
    assert summaries["control"]["metrics"]["world"]["steps"] > 100
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    planned, driven = (each["sampling"] for each in (plan["sampler"], summaries["control"]["about"]))
    assert (driven["num_steps"], driven["backend"]) == (planned["num_steps"], planned["backend"])
    assert planned["num_steps"] == 4
    assert (tmp_path / "control" / "report.html").exists()
