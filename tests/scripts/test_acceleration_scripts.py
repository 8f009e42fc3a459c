"""The real calibration and latency scripts on a small Push-T policy."""

import json

import pytest
from script_runs import run_script, save_small

from flowpolicy import FlowPolicy
from flowpolicy.acceleration.caching.schedule import Schedule

pytest.importorskip("pymunk", reason="Push-T is not installed")
pytest.importorskip("hydra", reason="hydra is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

PUSHT = ["env=pusht", "env.env_kwargs.max_episode_steps=48"]
SMALL = [
    "num_steps=6", "updates=3", "observations=64", "noise_seeds=1", "test_observations=8", "episodes=12",
    "search_iterations=2", "search_observations=8", "threads=1", *PUSHT,
]  # fmt: skip
TIMED = ["calls=6", "warm_up=1", "round_calls=3", "observations=8", "threads=1", *PUSHT]


@pytest.fixture(scope="module")
def checkpoints(repo_root, tmp_path_factory):
    """The shipped policies with a smaller network of random weights, which is exported in less time."""
    folder = tmp_path_factory.mktemp("checkpoints")
    shipped = repo_root / "benchmarks" / "checkpoints"
    return {
        name: save_small(shipped / f"pusht-{name}-seed0", folder / name)
        for name in ("flow_matching", "shortcut")
    }


@pytest.mark.slow
def test_a_calibrated_schedule_is_timed_and_refused_elsewhere(repo_root, tmp_path, checkpoints):
    checkpoint = f"checkpoint={checkpoints['flow_matching']}"
    done = run_script(tmp_path, repo_root, "calibrate_cache.py", checkpoint, *SMALL, "run_dir=cache")
    folder = tmp_path / "cache"
    assert done.stdout.splitlines()[-1] == str(folder / "summary.json")
    for name in ("schedules.png", "similarity.png", "similarity.npz"):
        assert (folder / name).stat().st_size > 1000
    assert all(f"| {method}" in done.stdout for method in ("uniform", "acs", "acs+bua", "searched"))
    schedule = Schedule.load(folder / "schedule.json")
    assert schedule.key.num_steps == 6
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    assert metrics[metrics["chosen"]]["rms_error"] == schedule.calibration["rms_error"] > 0

    options = [*TIMED, "backends=[eager]", f"schedules=[{folder / 'schedule.json'}]"]
    done = run_script(
        tmp_path, repo_root, "benchmark_latency.py", checkpoint, "num_steps=[6]", *options, "run_dir=time"
    )
    rows = json.loads((tmp_path / "time" / "latency.json").read_text())["rows"]
    assert [(row["backend"], row["method"]) for row in rows] == [
        ("eager", method) for method in ("full", schedule.method)
    ]
    for row in rows:
        assert 0 < row["floor"]["milliseconds"] < row["milliseconds"]["p50"] <= row["milliseconds"]["max"]
        assert row["calls"] == 6
        assert (row["rms_error"] < 1e-5) == (row["method"] == "full")
    assert (tmp_path / "time" / "latency.png").stat().st_size > 10_000

    other = f"checkpoint={checkpoints['shortcut']}"
    done = run_script(tmp_path, repo_root, "benchmark_latency.py", other, *options, "run_dir=no", fails=True)
    assert "another checkpoint" in done.stderr


def test_a_solver_is_searched(repo_root, tmp_path, checkpoints):
    checkpoint = f"checkpoint={checkpoints['flow_matching']}"
    small = ["observations=3", "test_observations=3", "episodes=1", "iterations=2", "threads=1", *PUSHT]
    done = run_script(tmp_path, repo_root, "search_solver.py", checkpoint, "nfe=2", *small, "run_dir=search")
    assert "| searched |" in done.stdout
    file = tmp_path / "search" / "solver.json"
    found = json.loads((tmp_path / "search" / "summary.json").read_text())["metrics"]
    assert found["rms_error"] <= found["least_rms_error_of_hand_made"]
    assert FlowPolicy.load(checkpoints["flow_matching"]).nfe(solver=str(file)) == 2


@pytest.mark.parametrize(
    ("script", "option", "words"),
    [
        ("calibrate_cache.py", "observations=8", ["observations is 8", "at least 64"]),
        ("calibrate_cache.py", "updates=40", ["updates is 40"]),
        ("calibrate_cache.py", "num_steps=1", ["nothing to reuse"]),
        ("calibrate_cache.py", "metod=acs", ["'metod'", "'method'"]),
        ("search_solver.py", "nfe=1", ["nfe is 1", "between 2 and 64"]),
        ("benchmark_latency.py", "backends=[tensorrt]", ["tensorrt", "onnx"]),
        ("benchmark_latency.py", "backends=[cuda_graph]", ["GPU"]),
        ("benchmark_latency.py", "schedules=[nowhere.json]", ["No cache schedule at nowhere.json"]),
    ],
)
def test_a_mistake_is_one_sentence(repo_root, tmp_path, checkpoints, script, option, words):
    by_script = {"calibrate_cache.py": SMALL, "search_solver.py": PUSHT}
    settings = by_script.get(script, [*TIMED, "num_steps=[2]", "device=cpu"])
    settings = [given for given in settings if given.split("=")[0] != option.split("=")[0]]
    checkpoint = f"checkpoint={checkpoints['flow_matching']}"
    done = run_script(tmp_path, repo_root, script, checkpoint, *settings, option, "run_dir=run", fails=True)
    for word in words:
        assert word in done.stderr
