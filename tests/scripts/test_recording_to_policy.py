"""From a recording to a policy without a simulator: the real scripts, on a small LeRobot dataset."""

from __future__ import annotations

import json

import numpy as np
import pytest
from script_runs import run_script

from flowpolicy import FlowPolicy
from flowpolicy.evaluation.task import BESIDE_THE_TASK

pytest.importorskip("hydra")
parquet = pytest.importorskip("pyarrow.parquet")

TINY = [
    "model.width=16", "model.depth=1", "model.num_heads=2", "train.steps=40", "train.warmup_steps=5",
    "train.batch_size=32", "train.log_every=20", "train.validate_every=0", "train.threads=1",
]  # fmt: skip
JOINTS = ["shoulder.pos", "elbow.pos"]


def record(folder, episodes=4, steps=40):
    """A LeRobot dataset (layout 3.0) of an arm that reaches for a place it sees."""
    import pyarrow

    rng = np.random.default_rng(0)
    columns = {
        key: [] for key in ("observation.state", "action", "timestamp", "frame_index", "episode_index")
    }
    for episode in range(episodes):
        joints, goal = rng.uniform(-1, 1, (2, 2))
        for frame in range(steps):
            wanted = joints + np.clip(goal - joints, -0.05, 0.05)
            row = [*joints, *goal], wanted.tolist(), frame / 20, frame, episode
            for values, value in zip(columns.values(), row, strict=True):
                values.append([float(number) for number in value] if isinstance(value, list) else value)
            joints = wanted
    names = {"observation.state": [*JOINTS, "x", "y"], "action": JOINTS}
    features = {key: {"dtype": "float32", "shape": [len(n)], "names": n} for key, n in names.items()}
    info = {"codebase_version": "v3.0", "fps": 20, "total_episodes": episodes, "features": features}
    (folder / "meta").mkdir(parents=True)
    (folder / "data").mkdir()
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    parquet.write_table(pyarrow.table(columns), folder / "data" / "file-000.parquet")


@pytest.fixture(scope="module")
def trained(repo_root, tmp_path_factory):
    """A folder with the recording, its import, and a policy."""
    folder = tmp_path_factory.mktemp("recording")
    record(folder / "recording")
    imported = run_script(
        folder, repo_root, "import_demos.py", "source=recording", "out=arm.zarr.zip", "run_dir=import"
    )
    (folder / "elsewhere").mkdir()
    pretrained = run_script(
        folder / "elsewhere", repo_root, "pretrain.py", "env=../arm.yaml", *TINY, f"run_dir={folder / 'run'}"
    )
    return folder, imported, pretrained


@pytest.mark.usefixtures("empty_figures")
def test_an_import_leaves_the_task_beside_the_store_and_keeps_one_that_is_there(trained, repo_root, tmp_path):
    folder, imported, _ = trained
    assert imported.stdout.splitlines()[-2:] == ["arm.yaml", str(folder / "import" / "summary.json")]
    assert "flowpolicy pretrain env=arm.yaml" in imported.stderr
    record(tmp_path / "recording")
    (tmp_path / "arm.yaml").write_text("name: mine\n")
    command = (tmp_path, repo_root, "import_demos.py", "source=recording", "run_dir=import")
    done = run_script(*command, "out=arm.zarr.zip")
    assert "arm.yaml is there already and stays as it is" in done.stderr
    assert (tmp_path / "arm.yaml").read_text() == "name: mine\n"
    run_script(*command, "out=other.zarr.zip", "task_file=false")
    assert not (tmp_path / "other.yaml").exists()


def test_pretraining_without_a_simulator_says_that_it_is_open_loop_and_leaves_figures_and_plots(trained):
    folder, _, done = trained
    run = folder / "run"
    (line,) = [line for line in done.stderr.splitlines() if "no simulator" in line]
    assert "open loop" in line
    assert "1 held-out episode" in line
    summary = json.loads((run / "summary.json").read_text())
    assert summary["task"] == "arm"
    assert "env=../arm.yaml" in summary["command"]
    found = summary["metrics"]["open_loop"]
    assert found["episodes"] == 1
    for method in ("policy", "hold_last", "nearest_neighbour"):
        assert len(found[method]["by_dimension"]) == len(found["dimensions"]) == 2
        assert len(found[method]["by_step"]) == len(found[method]["by_step_normalised"]) == 32
    assert "open_loop/hold_last" in (run / "metrics.csv").read_text().splitlines()[0]
    for name in ("open_loop.png", "open_loop_errors.png", "open_loop.csv", "curves.png"):
        assert (run / name).stat().st_size > 1000
    policy = FlowPolicy.load(run / "checkpoint")
    assert policy.spec.task["env_id"] is None
    assert policy.spec.chunk_shape == (32, 2)


@pytest.mark.parametrize(
    "script", ["evaluate", "finetune_reinflow", "collect_demos", "train_expert", "run_control"]
)
def test_what_needs_a_simulator_refuses_in_one_sentence(trained, repo_root, tmp_path, script):
    folder, *_ = trained
    pytest.importorskip("gymnasium")
    if script in ("finetune_reinflow", "train_expert"):
        pytest.importorskip("stable_baselines3")
    options = [f"env={folder / 'arm.yaml'}", f"run_dir={tmp_path / 'run'}"]
    if script in ("evaluate", "run_control"):
        options.append(f"checkpoint={folder / 'run' / 'checkpoint'}")
    done = run_script(tmp_path, repo_root, f"{script}.py", *options, fails=True)
    assert done.stderr.startswith("Task 'arm' has no simulator (env_id is null): set env_id")


@pytest.mark.usefixtures("empty_figures")
def test_latency_and_schedules_take_recorded_observations(trained, repo_root, tmp_path):
    folder, *_ = trained
    checkpoint = f"checkpoint={folder / 'run' / 'checkpoint'}"
    timing = ["backends=[eager]", "num_steps=[1]", "calls=4", "warm_up=1", "round_calls=2", "observations=4"]
    command = (tmp_path, repo_root, "benchmark_latency.py", checkpoint, *timing)
    done = run_script(*command, f"env={folder / 'arm.yaml'}", "run_dir=time")
    assert done.stdout.splitlines()[-1] == str(tmp_path / "time" / "summary.json")
    done = run_script(*command, "run_dir=no", fails=True)
    assert "env=PATH.yaml" in done.stderr


@pytest.mark.usefixtures("empty_figures")
def test_a_plan_is_made_without_episodes(trained, repo_root, tmp_path):
    folder, *_ = trained
    done = run_script(
        tmp_path, repo_root, "plan.py", f"checkpoint={folder / 'run' / 'checkpoint'}",
        f"env={folder / 'arm.yaml'}", "period_ms=1000", "quantile=0.5", "calls=6", "bouts=1",
        "observations=8", "backends=[eager]", "max_action_error=10", "search_iterations=0", "run_dir=plan",
    )  # fmt: skip
    assert "the task has no simulator" in done.stdout
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert plan["rollouts"] == {}
    assert plan["sampler"]["action_error"] == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: arm\nenv_id: null\ncontrl_hz: 20\n", ["'env.contrl_hz'", "did you mean 'env.control_hz'?"]),
        ("name: arm\nenv_id: null\npretrain: {stpes: 3}\n", ["'env.pretrain.stpes'", "'env.pretrain.steps'"]),
        ("name: arm\ncontrol_hz: 20\n", ["env.env_id is missing"]),
        ("name: [arm\n", ["task.yaml cannot be read as a task's YAML file"]),
        ("- arm\n", ["task.yaml must hold a task's settings"]),
        ("name: arm\nenv_id: null\ncontrol_hz: ???\n", ["'env.control_hz' needs a value"]),
        ("name: arm\nenv_id: null\naction_bounds: [[1], [0]]\n", ["env.action_bounds"]),
        (None, ["There is no task file", "task.yaml"]),
    ],
)
def test_a_task_file_that_is_wrong_is_refused_in_one_sentence(repo_root, tmp_path, text, words):
    if text is not None:
        (tmp_path / "task.yaml").write_text(text)
    done = run_script(tmp_path, repo_root, "pretrain.py", "env=task.yaml", "run_dir=run", fails=True)
    assert all(word in done.stderr for word in words), done.stderr


def test_what_a_task_file_may_say_of_training_is_what_the_settings_read(repo_root):
    import re

    text = "".join(path.read_text() for path in (repo_root / "configs").glob("*.yaml"))
    for group in ("data", "model"):
        text += "".join(path.read_text() for path in (repo_root / "configs" / group).glob("*.yaml"))
    for group in ("pretrain", "finetune"):
        read = set(re.findall(rf"oc\.select:env\.{group}\.(\w+)", text))
        assert read == set(BESIDE_THE_TASK[group])


def test_bounds_of_other_actions_are_refused(trained, repo_root, tmp_path):
    folder, *_ = trained
    text = (folder / "arm.yaml").read_text().replace("  - [", "  - [0.0, ")
    (folder / "other.yaml").write_text(text)
    done = run_script(
        tmp_path, repo_root, "pretrain.py", f"env={folder / 'other.yaml'}", "run_dir=run", fails=True
    )
    assert "env.action_bounds has 3 dimensions and the actions of" in done.stderr
