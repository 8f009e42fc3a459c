"""The scripts that bring and inspect demonstrations."""

import json

import pytest
from script_runs import run_script, save_small

pytest.importorskip("hydra", reason="hydra is not installed")


@pytest.mark.parametrize(
    ("script", "arguments", "mention"),
    [
        ("import_demos", ["source=x", "out=y", "formt=d4rl"], "format"),
        ("import_demos", ["source=x", "out=y", "env=pushd"], "pusht"),
        ("import_demos", ["out=y"], "source"),
        ("import_demos", ["source=missing.hdf5", "out=y"], "missing.hdf5"),
        ("inspect_demos", ["path=missing.zarr"], "missing.zarr"),
        ("collect_demos", [], "env=NAME, or checkpoint=PATH"),
        ("collect_demos", ["checkpoint=missing"], "missing"),
        ("collect_demos", ["checkpoint=missing", "level=medium"], "level"),
        ("collect_demos", ["env=hopper", "only_successes=true"], "only_successes"),
    ],
)
def test_a_mistake_ends_them_with_one_sentence(repo_root, tmp_path, script, arguments, mention):
    done = run_script(
        tmp_path, repo_root, f"{script}.py", *arguments, f"run_dir={tmp_path / 'run'}", fails=True
    )
    assert done.returncode == 1
    assert mention in done.stderr
    assert not (tmp_path / "y").exists()


def test_a_policy_collects_its_own_episodes(repo_root, tmp_path):
    pytest.importorskip("mujoco")
    small = save_small(repo_root / "benchmarks/checkpoints/hopper-shortcut-seed0", tmp_path / "small")
    options = (f"checkpoint={small}", "episodes=2", "env.env_kwargs.max_episode_steps=20", "out=own.zarr.zip")
    done = run_script(tmp_path, repo_root, "collect_demos.py", *options, f"run_dir={tmp_path / 'run'}")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert done.stdout.splitlines()[-1] == str(tmp_path / "run" / "summary.json")
    assert (summary["task"], summary["policy"], summary["checkpoint"]) == ("hopper", "shortcut", str(small))
    assert summary["metrics"]["episodes"] == 2
    assert 2 <= summary["steps"] <= 40
    assert (tmp_path / "own.zarr.zip").exists()
