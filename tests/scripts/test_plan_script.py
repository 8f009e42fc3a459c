"""The real planning script; the loop that its plan drives is in test_pretrain_to_robot.py."""

from __future__ import annotations

import json

import pytest
from script_runs import run_script, save_small

pytest.importorskip("mujoco", reason="mujoco is not installed")
pytest.importorskip("hydra", reason="hydra is not installed")

SMALL = [
    "calls=12", "bouts=2", "pause_s=0.05", "quantile=0.5", "observations=16", "episodes=2",
    "backends=[eager]", "search_iterations=2", "env.env_kwargs.max_episode_steps=50",
]  # fmt: skip
PERIOD_MS = 500  # kept on a machine that does much else too


@pytest.fixture(scope="module")
def checkpoints(repo_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    shipped = repo_root / "benchmarks" / "checkpoints"
    small = save_small(shipped / "hopper-shortcut-seed0", folder / "small")
    return {"small": f"checkpoint={small}", "other": f"checkpoint={shipped}/hopper-reinflow-seed0"}


@pytest.mark.slow
def test_a_plan_is_made_explained_and_refused_elsewhere(repo_root, tmp_path, checkpoints):
    options = [checkpoints["small"], "env=hopper", f"period_ms={PERIOD_MS}", *SMALL, "run_dir=plan"]
    done = run_script(tmp_path, repo_root, "plan.py", *options)
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert plan["reason"] in done.stdout
    assert "**chosen**" in done.stdout
    assert plan["sampler"]["latency_ms"]["bound"] <= PERIOD_MS
    assert plan["sampler"]["action_error"] <= 0.1
    assert (tmp_path / "plan" / "plan.png").stat().st_size > 10_000
    drive = ["env=hopper", "duration_s=1", "video=0", "plan=plan/plan.json"]
    done = run_script(
        tmp_path, repo_root, "run_control.py", checkpoints["other"], *drive, "run_dir=no", fails=True
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
        tmp_path, repo_root, "plan.py", checkpoints["small"], "env=hopper", *given, *options,
        "run_dir=plan", fails=True,
    )  # fmt: skip
    for word in words:
        assert word in done.stderr
