"""The real script drives a simulated robot and a trace in real time, or says in one sentence why not."""

from __future__ import annotations

import json

import pytest
from script_runs import run_script

pytest.importorskip("mujoco", reason="mujoco is not installed")
pytest.importorskip("hydra", reason="hydra is not installed")


SCRIPT = "run_control.py"


@pytest.fixture(scope="module")
def checkpoint(repo_root):
    return f"checkpoint={repo_root}/benchmarks/checkpoints/hopper-shortcut-seed0"


@pytest.mark.slow
def test_a_simulated_robot_is_driven_in_real_time(repo_root, tmp_path, checkpoint):
    done = run_script(
        tmp_path, repo_root, SCRIPT, checkpoint, "env=hopper", "duration_s=2", "num_steps=1", "fast_steps=1",
        "spares=1", "video=0.2", "run_dir=run",
    )  # fmt: skip
    folder = tmp_path / "run"
    assert done.stdout.splitlines()[-1] == str(folder / "summary.json")
    summary = json.loads((folder / "summary.json").read_text())
    metrics = summary["metrics"]
    assert metrics["stopped"] == "finished"
    assert metrics["ticks"] + metrics["events"].get("deadline missed", 0) == 250
    assert sum(metrics["world"]["lengths"]) == metrics["world"]["steps"] > 150
    assert metrics["sources"]["chunk"] > 0.5
    assert (folder / "report.html").stat().st_size > 10_000
    assert json.loads((folder / "events.json").read_text())["counts"] == metrics["events"]
    assert (folder / "telemetry.parquet").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("empty_figures")
@pytest.mark.parametrize(
    ("fusion", "inference", "robot"), [("rtc", "process", "mujoco"), ("ensemble", "thread", "trace")]
)
def test_chunks_are_fused_in_real_time_and_a_trace_is_driven_too(
    repo_root, tmp_path, checkpoint, fusion, inference, robot
):
    run_script(
        tmp_path, repo_root, SCRIPT, checkpoint, "env=hopper", "duration_s=1.5", f"control.fusion={fusion}",
        "control.execute_horizon=2", f"robot={robot}", "robot.rate_hz=20", f"inference={inference}",
        "backend=eager", "spares=0", "video=0", "run_dir=run",
    )  # fmt: skip
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["about"]["fusion"] == fusion
    assert summary["metrics"]["stopped"] == "finished"
    assert summary["metrics"]["sources"]["chunk"] > 0.5
    assert "inference error" not in summary["metrics"]["events"]
    assert ("world" in summary["metrics"]) == (robot == "mujoco")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["fast_steps=3"], ["powers of two"]),
        (["control.execute_horizon=5"], ["chunk length 4"]),
        (["control.fusion=rct"], ["did you mean 'rtc'"]),
        (["robot=trace"], ["robot.path"]),
        (["plan=nowhere.json"], ["nowhere.json"]),
        (["plan=nowhere.json", "num_steps=1"], ["plan= decides num_steps"]),
        (["plan=nowhere.json", "backend=onnx"], ["plan= decides backend"]),
        (["plan=nowhere.json", "control.fusion=rtc"], ["control.fusion=rtc", "leave out plan="]),
        (["control.fusion=rtc", "backend=onnx"], ["control.fusion=rtc", "backend="]),
        (["env=pusht"], ["choose the task and robot that the policy was trained for"]),
        (["control.saftey.miss_limit=3"], ["control.safety"]),
        ([], ["safe action"]),
    ],
)
def test_a_mistake_is_one_sentence(repo_root, tmp_path, checkpoint, options, words):
    env = [] if not options or options[0] in ("robot=trace", "env=pusht") else ["env=hopper"]
    done = run_script(
        tmp_path, repo_root, SCRIPT, checkpoint, *env, *options, "duration_s=1", "run_dir=run", fails=True
    )
    for word in words:
        assert word in done.stderr
