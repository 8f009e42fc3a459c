"""The real planning script, and the loop that its plan drives."""

from __future__ import annotations

import json

import pytest
from script_runs import run_script

pytest.importorskip("mujoco", reason="mujoco is not installed")
pytest.importorskip("hydra", reason="hydra is not installed")

SMALL = [
    "calls=40", "bouts=2", "pause_s=0.1", "quantile=0.9", "observations=16", "episodes=2", "backends=[eager]",
    "search_iterations=2", "+env.env_kwargs.max_episode_steps=50",
]  # fmt: skip
PERIOD_MS = 500  # kept on a machine that does much else too


@pytest.fixture(scope="module")
def checkpoints(repo_root):
    folder = repo_root / "benchmarks" / "checkpoints"
    return {name: f"checkpoint={folder}/hopper-{name}-seed0" for name in ("reinflow", "shortcut")}


@pytest.mark.slow
def test_a_plan_is_made_explained_and_driven(repo_root, tmp_path, checkpoints):
    options = [checkpoints["shortcut"], "env=hopper", f"period_ms={PERIOD_MS}", *SMALL, "run_dir=plan"]
    done = run_script(tmp_path, repo_root, "plan.py", *options)
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert plan["reason"] in done.stdout
    assert "**chosen**" in done.stdout
    assert plan["sampler"]["latency_ms"]["bound"] <= PERIOD_MS
    assert plan["sampler"]["action_error"] <= 0.1
    assert (tmp_path / "plan" / "plan.png").stat().st_size > 10_000
    drive = ["env=hopper", "duration_s=1", "video=0", "plan=plan/plan.json"]
    run_script(tmp_path, repo_root, "run_control.py", checkpoints["shortcut"], *drive, "run_dir=drive")
    about = json.loads((tmp_path / "drive" / "summary.json").read_text())["about"]
    assert about["sampling"]["num_steps"] == plan["sampler"]["sampling"]["num_steps"]
    assert about["sampling"]["backend"] == "eager"
    done = run_script(
        tmp_path, repo_root, "run_control.py", checkpoints["reinflow"], *drive, "run_dir=no", fails=True
    )
    assert "another checkpoint" in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["period_ms=0.01"], ["No sampler keeps 0.01 ms", "period_ms="]),
        (["period_ms=50", "backends=[cuda_graph]"], ["None of the backends runs here", "GPU"]),
        (["period_ms=5", "quantile=2"], ["quantile is 2"]),
        ([], ["period_ms"]),
    ],
)
def test_a_deadline_that_cannot_be_kept_is_one_sentence(repo_root, tmp_path, checkpoints, options, words):
    given = [option for option in SMALL if option.split("=")[0] not in {o.split("=")[0] for o in options}]
    done = run_script(
        tmp_path, repo_root, "plan.py", checkpoints["shortcut"], "env=hopper", *given, *options,
        "run_dir=plan", fails=True,
    )  # fmt: skip
    for word in words:
        assert word in done.stderr
