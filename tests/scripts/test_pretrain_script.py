"""The real scripts, a few steps long, on the shipped Hopper demonstrations."""

import json
import os
import subprocess

import pytest
import torch
from script_runs import run_script

from flowpolicy import FlowPolicy
from flowpolicy.data.store import write_demonstrations

TINY = [
    "model.width=16", "model.depth=1", "train.steps=20", "train.batch_size=16", "train.validate_every=10",
    "train.log_every=10", "train.num_envs=2", "train.threads=1",
]  # fmt: skip
SUMMARY = {"task", "policy", "seed", "steps", "wall_seconds", "metrics", "checkpoint", "versions", "command"}


@pytest.fixture(scope="module")
def mujoco():
    pytest.importorskip("mujoco", reason="the simulator is not installed")
    pytest.importorskip("hydra", reason="hydra is not installed")


@pytest.fixture(autouse=True)
def nothing_leaves_the_machine(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


def summary_of(done, folder):
    """The file the script names last, which is the one in its run folder."""
    assert done.stdout.splitlines()[-1] == str(folder / "summary.json")
    content = json.loads((folder / "summary.json").read_text())
    assert content.keys() >= SUMMARY
    return content


@pytest.fixture(scope="module")
def pretrained(mujoco, repo_root, tmp_path_factory, forking_python):
    folder = tmp_path_factory.mktemp("pretrained")
    settings = [*TINY, "train.final_episodes=2", "seed=3", f"run_dir={folder}"]
    done = run_script(repo_root, repo_root, "pretrain.py", *settings, python=forking_python)
    return done, folder


@pytest.mark.slow
def test_pretrain_leaves_a_summary_a_checkpoint_a_video_and_a_plot(pretrained):
    done, folder = pretrained
    summary = summary_of(done, folder)
    assert (summary["task"], summary["policy"], summary["seed"], summary["steps"]) == (
        "hopper",
        "shortcut",
        3,
        20,
    )
    assert summary["wall_seconds"] > 0
    assert "scripts/pretrain.py" in summary["command"]
    assert "seed=3" in summary["command"]
    assert {"torch", "gymnasium", "mujoco"} <= summary["versions"].keys()
    metrics = summary["metrics"]
    low, high = metrics["return_ci95"]
    assert low <= metrics["return_mean"] <= high
    assert 1200 < metrics["demo_return_mean"] < 1700
    policy = FlowPolicy.load(summary["checkpoint"])
    assert policy.act(torch.zeros(1, 1, 11)).shape == (1, 4, 3)
    assert policy.spec.task["env_id"] == "Hopper-v5"
    assert (folder / "curves.png").stat().st_size > 1000
    if "video" not in done.stderr.lower():  # a machine without a GL backend says so and goes on
        assert (folder / "video.mp4").stat().st_size > 1000


@pytest.mark.slow
def test_evaluate_sweeps_the_steps_of_that_checkpoint(pretrained, repo_root, tmp_path):
    checkpoint = pretrained[1] / "checkpoint"
    done = run_script(
        repo_root, repo_root, "evaluate.py", f"checkpoint={checkpoint}", "num_steps=2", "k_sweep=[1,4]",
        "episodes=3", "num_envs=3", "video=0", "threads=1", f"run_dir={tmp_path}",
    )  # fmt: skip
    summary = summary_of(done, tmp_path)
    assert summary["task"] == "hopper"
    assert summary["checkpoint"] == str(checkpoint)
    rows = {row["num_steps"]: row for row in summary["metrics"]["k_sweep"]}
    assert set(rows) == {1, 2, 4}
    assert [rows[k]["nfe"] for k in (1, 2, 4)] == [1, 2, 4]
    assert rows[2]["return_mean"] == summary["metrics"]["return_mean"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepz=3", ["'train.stepz'", "did you mean 'train.steps'?"]),
        ("policy=shortcutt", ["shortcutt", "flow_matching"]),
        ("train.steps=-1", ["train.steps is -1", "at least 1"]),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_status_one(
    mujoco, repo_root, tmp_path, forking_python, override, words
):
    settings = [override, f"run_dir={tmp_path / 'run'}"]
    python = forking_python if override.startswith("train.stepz") else None
    done = run_script(repo_root, repo_root, "pretrain.py", *settings, fails=True, python=python)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "run" / "checkpoint").exists()


@pytest.mark.slow
def test_torchrun_trains_with_two_processes(mujoco, repo_root, tmp_path, forking_python):
    command = [
        forking_python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "scripts/pretrain.py", *TINY, "train.final_episodes=0", "video=false", f"run_dir={tmp_path}",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=repo_root, env={**os.environ, "PYTHON_EXEC": str(forking_python)},
        capture_output=True, text=True, check=False, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("summary.json") == 1  # one of the two speaks
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 20
    FlowPolicy.load(tmp_path / "checkpoint")


@pytest.mark.usefixtures("empty_figures")
def test_a_run_folder_in_use_is_refused_and_one_a_killed_run_left_is_not(repo_root, tmp_path, demos):
    filelock = pytest.importorskip("filelock")
    pytest.importorskip("hydra", reason="hydra is not installed")
    path, run_dir = f"path={write_demonstrations(tmp_path / 'demos.zarr', demos)}", tmp_path / "run"
    run_dir.mkdir()
    (run_dir / ".lock").touch()  # what a killed run leaves
    with filelock.FileLock(run_dir / ".lock"):
        done = run_script(repo_root, repo_root, "inspect_demos.py", path, f"run_dir={run_dir}", fails=True)
        assert done.stderr.strip() == (
            f"Another program is writing to {run_dir}; wait for it, or choose another run_dir."
        )
    (run_dir / ".lock").touch()
    run_script(repo_root, repo_root, "inspect_demos.py", path, f"run_dir={run_dir}")
    assert not (run_dir / ".lock").exists()


def test_a_device_this_machine_lacks_is_refused(pretrained, repo_root, tmp_path):
    done = run_script(
        repo_root, repo_root, "evaluate.py", f"checkpoint={pretrained[1] / 'checkpoint'}", "device=cuda:77",
        f"run_dir={tmp_path / 'run'}", fails=True,
    )  # fmt: skip
    assert done.stderr.strip() == (
        "device=cuda:77 is not available on this machine; use device=auto or device=cpu."
    )
    assert not (tmp_path / "run").exists()
