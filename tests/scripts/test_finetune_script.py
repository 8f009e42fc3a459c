"""The real fine-tuning script, a few iterations long, on Hopper; without a checkpoint it pretrains first."""

import json

import pytest
from script_runs import run_script

from flowpolicy import FlowPolicy
from flowpolicy.flow.sampler_spec import SamplerSpec

pytest.importorskip("mujoco", reason="the simulator is not installed")
pytest.importorskip("hydra", reason="hydra is not installed")
pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")

SHORT = [
    "total_steps=192", "num_envs=2", "workers=0", "reinflow.n_steps=16", "reinflow.batch_size=16",
    "reinflow.critic_warmup=1", "final_episodes=2", "evaluation_envs=2", "threads=1",
    "env.env_kwargs.max_episode_steps=60", "env.env_kwargs.width=128", "env.env_kwargs.height=128",
]  # fmt: skip


def finetune(folder, repo_root, *options, fails=False):
    return run_script(folder, repo_root, "finetune_reinflow.py", *options, fails=fails)


@pytest.mark.slow
@pytest.mark.usefixtures("empty_figures")
def test_it_finetunes_a_shipped_checkpoint_and_goes_on(repo_root, tmp_path):
    checkpoint = repo_root / "benchmarks" / "checkpoints" / "hopper-shortcut-seed0"
    done = finetune(tmp_path, repo_root, *SHORT, f"checkpoint={checkpoint}", "run_dir=run", "num_steps=2")
    assert done.stdout.splitlines()[-1] == str(tmp_path / "run" / "summary.json")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # A policy that hops, before and after: standing still gives 60 in as many steps.
    assert summary["metrics"]["base"]["return_mean"] > 90
    assert summary["metrics"]["tuned"]["return_mean"] > 90
    assert summary["num_steps"] == 2
    tuned = FlowPolicy.load(tmp_path / "run" / "checkpoint").config.tuned
    assert tuned == SamplerSpec(num_steps=2, solver="euler")
    if "video" not in done.stderr.lower():  # a machine without a GL backend says so and goes on
        assert (tmp_path / "run" / "video.mp4").stat().st_size > 10_000
    again = finetune(
        tmp_path, repo_root, *SHORT, f"checkpoint={checkpoint}", "run_dir=run", "num_steps=2", fails=True
    )
    assert "resume=true" in again.stderr
    assert len(again.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("empty_figures")
def test_without_a_checkpoint_it_finds_the_pretrained_one(repo_root, tmp_path):
    folder = tmp_path / "runs" / "base" / "hopper-policy_shortcut-seed_0"
    policy = FlowPolicy.load(repo_root / "benchmarks" / "checkpoints" / "hopper-shortcut-seed0")
    policy.save(folder / "checkpoint")
    (folder / "summary.json").write_text("{}")
    finetune(tmp_path, repo_root, *SHORT, "total_steps=1", "final_episodes=0", "run_dir=run")
    content = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert content["base"] == "runs/base/hopper-policy_shortcut-seed_0/checkpoint"


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("reinflow.gama=0.9", ["'reinflow.gama'", "did you mean 'reinflow.gamma'?"]),
        ("num_steps=0", ["num_steps is 0"]),
        ("env=walker2d", ["walker2d", "env=hopper"]),
        ("checkpoint=nowhere", ["No checkpoint at nowhere"]),
    ],
)
def test_a_mistake_is_one_sentence(repo_root, tmp_path, option, words):
    checkpoint = repo_root / "benchmarks" / "checkpoints" / "hopper-shortcut-seed0"
    done = finetune(
        tmp_path, repo_root, *SHORT, f"checkpoint={checkpoint}", option, "run_dir=run", fails=True
    )
    assert len(done.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "run").exists()
