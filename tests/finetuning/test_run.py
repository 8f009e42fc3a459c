"""Whole fine-tuning runs on small environments: what they leave, what they refuse, what they survive."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")

from toy_practice import make_policy

from flowpolicy import FlowPolicy
from flowpolicy.acceleration.sampler import build_sampler
from flowpolicy.errors import CheckpointError, ConfigError, FlowPolicyError, TaskError
from flowpolicy.finetuning.offpolicy.algorithms import ALGORITHMS, QChunk
from flowpolicy.finetuning.offpolicy.config import OffPolicyConfig
from flowpolicy.finetuning.offpolicy.off_policy import OffPolicy
from flowpolicy.finetuning.offpolicy.run import OffPolicyRecipe, finetune_offpolicy
from flowpolicy.finetuning.recorder import STATE_FILE
from flowpolicy.finetuning.reinflow import ReinFlow
from flowpolicy.finetuning.rules import PPO
from flowpolicy.finetuning.run import finetune
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.pretraining.run import pretrain
from flowpolicy.runs.distributed import Processes
from flowpolicy.runs.loggers import read_metrics
from flowpolicy.runs.run_folder import PRETRAINING, claim
from flowpolicy.settings import build

OFFPOLICY = {
    "algorithm": {"name": "qchunk", "proposals": 3, "target_proposals": 2}, "save_every": 1,
    "offpolicy": {
        "learning_starts": 50, "train_freq": 4, "batch_size": 16, "members": 2, "critic_hidden": [16],
    },
}  # fmt: skip
REINFLOW = {"n_steps": 8, "batch_size": 16, "n_epochs": 1, "critic_warmup": 0}


@pytest.fixture
def settings(tmp_path):
    make_policy().save(tmp_path / "pretrained")
    return {
        "env": {"name": "reach", "env_id": "toy_practice:toy/Reach-v0"},
        "checkpoint": str(tmp_path / "pretrained"),
        "num_steps": 2, "total_steps": 400, "num_envs": 4, "workers": 0, "final_episodes": 6,
        "evaluation_envs": 3, "video": False, "reinflow": REINFLOW,
    }  # fmt: skip


def test_a_run_leaves_a_checkpoint_curves_and_figures_before_and_after(settings, tmp_path):
    summary = finetune(
        {**settings, "evaluate_every": 150, "evaluate_episodes": 3}, tmp_path / "run", command="x"
    )
    assert summary == tmp_path / "run" / "summary.json"
    content = json.loads(summary.read_text())
    metrics = content["metrics"]
    for when in ("base", "tuned"):
        assert metrics[when]["episodes"] == 6
        assert 0 < metrics[when]["return_mean"] < 10
    low, high = metrics["return_gain_ci95"]
    assert low <= metrics["return_gain"] <= high
    assert metrics["return_gain"] == pytest.approx(
        metrics["tuned"]["return_mean"] - metrics["base"]["return_mean"]
    )
    assert content["steps"] >= 400
    assert set(metrics["seconds"]) == {"simulation", "inference", "update"}
    assert min(metrics["seconds"].values()) > 0
    policy = FlowPolicy.load(content["checkpoint"])
    assert policy.config.tuned == SamplerSpec(num_steps=2, solver="euler")
    assert policy.spec.task["env_id"] == "toy_practice:toy/Reach-v0"
    assert not [name for name in policy.state_dict() if "noise" in name]
    with pytest.raises(ConfigError, match="tuned for num_steps=2"):
        policy.act(torch.zeros(1, 1, 2), num_steps=4)
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert len([row for row in rows if "evaluation/return" in row]) >= 3  # on the way, and at the end
    assert {"train/kl", "train/clip_fraction", "train/noise_std", "time/steps_per_s"} <= rows[-2].keys()
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000
    first, second = (
        np.genfromtxt(tmp_path / "run" / f"episodes_{when}.csv", delimiter=",", names=True)["seed"]
        for when in ("before", "after")
    )
    np.testing.assert_array_equal(first, second)


@pytest.mark.usefixtures("empty_figures")
def test_workers_see_what_one_process_sees(settings, tmp_path):
    ends = []
    for workers in (0, 2):
        finetune({**settings, "workers": workers, "final_episodes": 0}, tmp_path / f"{workers}")
        ends.append(FlowPolicy.load(tmp_path / f"{workers}" / "checkpoint").state_dict())
    for name, tensor in ends[0].items():
        assert torch.allclose(tensor, ends[1][name], atol=1e-5), name


@pytest.mark.usefixtures("empty_figures")
def test_regularizers_and_distillation_run_and_are_recorded(settings, tmp_path, demos):
    from flowpolicy.data.store import Demonstrations, write_demonstrations

    arrays = {"observation": demos.arrays["observation"][:, :2], "action": demos.arrays["action"]}
    store = tmp_path / "demos.zarr.zip"
    write_demonstrations(store, Demonstrations(arrays, demos.episode_ends, {}, "toy"))
    regularization = {"wasserstein": 0.1, "behaviour_cloning": 0.1, "demonstrations": str(store)}
    extra = {"regularization": regularization, "distill": {"steps": 20, "batch_size": 16}}
    finetune({**settings, **extra}, tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert any(row.get("train/wasserstein", 0) > 0 for row in rows)
    assert any(row.get("train/behaviour_cloning", 0) > 0 for row in rows)
    policy = FlowPolicy.load(tmp_path / "run" / "checkpoint")
    assert policy.config.tuned is None  # any K again
    assert policy.spec.metadata["distilled"]
    policy.act(torch.zeros(1, 1, 2), num_steps=8)
    finetune({**settings, **extra, "resume": True, "total_steps": settings["total_steps"]}, tmp_path / "run")


def _forget(run_dir: Path, group: str, name: str) -> None:
    file = run_dir / "config.json"
    settings = json.loads(file.read_text())
    del settings[group][name]
    file.write_text(json.dumps(settings))


@pytest.mark.usefixtures("empty_figures")
def test_a_run_is_continued_and_not_overwritten(settings, tmp_path):
    run_dir = tmp_path / "run"
    finetune(settings, run_dir)
    with pytest.raises(ConfigError, match="resume=true"):
        finetune(settings, run_dir)
    other = {**settings, "resume": True, "reinflow": {**REINFLOW, "gamma": 0.9}}
    with pytest.raises(CheckpointError, match=r"reinflow\.gamma=0\.995 and not 0\.9"):
        finetune(other, run_dir)
    before = ReinFlow.load(run_dir / STATE_FILE).num_timesteps
    _forget(run_dir, "reinflow", "gae_lambda")  # as begun before there were these
    _forget(run_dir, "noise", "minimum")
    given = {**settings, "resume": True, "update": {"name": "ppo", "clip_range": PPO.clip_range}}
    finetune(given, run_dir)  # nothing is left to do
    assert ReinFlow.load(run_dir / STATE_FILE).num_timesteps == before
    shutil.rmtree(run_dir / "checkpoint")  # written again, as the state has it
    summary = finetune({**settings, "resume": True}, run_dir)
    FlowPolicy.load(json.loads(summary.read_text())["checkpoint"])
    (run_dir / STATE_FILE).write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="damaged"):
        finetune({**settings, "resume": True}, run_dir)


@pytest.mark.parametrize("what", ["reward", "observation"])
@pytest.mark.parametrize(("workers", "rule"), [(0, "nft"), (2, "ppo"), (0, "qchunk")])
def test_what_is_not_finite_stops_the_run_and_loses_nothing(settings, tmp_path, what, workers, rule):
    run_dir, is_offpolicy = tmp_path / "run", rule in ALGORITHMS
    task = {**settings["env"], "env_kwargs": {"broken_at": 100, "what": what}}
    given = {**settings, "env": task, "workers": workers, "final_episodes": 0}
    run, model = (finetune_offpolicy, OffPolicy) if is_offpolicy else (finetune, ReinFlow)
    own = OFFPOLICY if is_offpolicy else {"reinflow": REINFLOW, "update": {"name": rule}}
    del given["reinflow"]
    with pytest.raises(FlowPolicyError, match=f"(?i)environment .*{what}.*") as caught:
        run({**given, **own}, run_dir)
    assert "\n" not in str(caught.value)
    saved = model.load(run_dir / STATE_FILE)
    assert saved.num_timesteps >= 200  # of the iterations before
    assert all(torch.isfinite(value).all() for value in saved.actor_critic.state_dict().values())


def test_an_offpolicy_run_of_two_processes_is_refused(settings):
    del settings["reinflow"]
    config = build(OffPolicyConfig, {**settings, **OFFPOLICY}, "")
    with pytest.raises(ConfigError, match="one process; start it without torchrun"):
        OffPolicyRecipe(config, FlowPolicy.load(settings["checkpoint"]), Processes(count=2))


@pytest.mark.usefixtures("empty_figures")
def test_an_offpolicy_run_leaves_a_policy_that_is_used_as_any_other(settings, tmp_path):
    del settings["reinflow"]
    run_dir = tmp_path / "run"
    summary = finetune_offpolicy({**settings, **OFFPOLICY, "total_steps": 200}, run_dir)
    metrics = json.loads(summary.read_text())["metrics"]
    assert metrics["base"]["episodes"] == metrics["tuned"]["episodes"] == 6
    rows = read_metrics(run_dir / "metrics.csv")
    assert {"train/critic_loss", "train/value", "rollout/return", "time/update_s"} <= rows[-2].keys()
    policy = FlowPolicy.load(run_dir / "checkpoint")
    assert policy.spec.noise_shape == (4, 3 * 2)
    observation = np.full((5, 1, 2), 0.3, np.float32)
    noise = policy.noise(5, None, torch.Generator().manual_seed(0))
    chunk = policy.act(observation, noise=noise)
    sampler = build_sampler(policy)
    torch.testing.assert_close(sampler.act(observation, noise=noise), chunk)
    assert sampler.nfe() == policy.nfe() == 3 * 2
    with pytest.raises(ConfigError, match="without steering"):
        build_sampler(policy, backend="onnx")
    with pytest.raises(ConfigError, match="without steering"):
        finetune(
            {**settings, "checkpoint": str(run_dir / "checkpoint"), "reinflow": REINFLOW}, tmp_path / "x"
        )
    with pytest.raises(CheckpointError, match=r"offpolicy\.gamma=0\.99 and not 0\.9"):
        finetune_offpolicy(
            {**settings, **OFFPOLICY, "resume": True, "offpolicy": {**OFFPOLICY["offpolicy"], "gamma": 0.9}},
            run_dir,
        )
    _forget(run_dir, "offpolicy", "tau")
    given = {**settings, **OFFPOLICY, "resume": True, "total_steps": 200}
    given["algorithm"] = {**given["algorithm"], "imitation_every": QChunk.imitation_every}
    finetune_offpolicy(given, run_dir)
    longer = {**settings, **OFFPOLICY, "distill": {"steps": 5, "batch_size": 16}}
    finetune_offpolicy(longer, tmp_path / "distilled")
    assert FlowPolicy.load(tmp_path / "distilled" / "checkpoint").steering is None


@pytest.mark.usefixtures("empty_figures")
@pytest.mark.parametrize("rule", ["awm", "qchunk"])
def test_an_environment_that_dies_is_replaced_and_counted(settings, tmp_path, rule):
    task = {
        "name": "mortal",
        "env_id": "toy_practice:toy/Mortal-v0",
        "env_kwargs": {"marker": str(tmp_path / "died")},
    }
    run, own = (
        (finetune_offpolicy, OFFPOLICY)
        if rule in ALGORITHMS
        else (finetune, {"reinflow": REINFLOW, "update": {"name": rule}})
    )
    del settings["reinflow"]
    changed = {"env": task, "workers": 2, "final_episodes": 0, "total_steps": 300}
    summary = run({**settings, **changed, **own}, tmp_path / "run")
    assert (tmp_path / "died").exists()
    assert json.loads(summary.read_text())["metrics"]["worker_restarts"] == 1
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert rows[-1]["rollout/worker_restarts"] == 1


def test_what_does_not_fit_is_one_sentence(settings, tmp_path):
    cases = {
        "3 environments": ({"num_envs": 0}, ConfigError, "num_envs is 0"),
        "another task": ({"env": {"name": "p", "env_id": "Pendulum-v1"}}, TaskError, "'p' takes actions"),
        "K": ({"num_steps": 3}, ConfigError, "powers of two"),
        "horizon": (
            {"env": {**settings["env"], "action_horizon": 8, "execute_horizon": 8}},
            ConfigError, "action_horizon=8",
        ),
        "rule": ({"update": {"name": "ppoo"}}, ConfigError, "did you mean 'ppo'"),
        "rule's setting": ({"update": {"name": "ppo", "clip": 1}}, ConfigError, "update.clip"),
        "no checkpoint": ({"checkpoint": str(tmp_path / "nowhere")}, CheckpointError, "No checkpoint"),
        "no demonstrations": (
            {"regularization": {"behaviour_cloning": 1.0}}, ConfigError, "needs demonstrations",
        ),
        "logger": ({"loggers": ["paper"]}, ConfigError, "loggers"),
        "noise": ({"noise": {"minimum": -1.0}}, ConfigError, "noise.minimum"),
    }  # fmt: skip
    for changed, error, words in cases.values():
        with pytest.raises(error, match=words) as caught:
            finetune({**settings, **changed}, tmp_path / "refused")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "refused" / STATE_FILE).exists()


@pytest.mark.usefixtures("empty_figures")
def test_a_checkpoint_tuned_for_another_k_is_refused(settings, tmp_path):
    short = {**settings, "final_episodes": 0, "total_steps": 100}
    finetune(short, tmp_path / "run")
    tuned = {**short, "checkpoint": str(tmp_path / "run" / "checkpoint")}
    with pytest.raises(ConfigError, match="tuned for num_steps=2"):
        finetune({**tuned, "num_steps": 1}, tmp_path / "again")
    finetune(tuned, tmp_path / "again")  # with the same K it may go on
    del tuned["num_steps"]  # which is the one where none is asked for
    for resume in (False, True):
        finetune({**tuned, "resume": resume}, tmp_path / "third")
    assert FlowPolicy.load(tmp_path / "third" / "checkpoint").sampling.num_steps == 2


@pytest.mark.usefixtures("empty_figures")
def test_a_folder_belongs_to_one_kind_of_run(settings, tmp_path):
    run_dir = tmp_path / "run"
    finetune({**settings, "final_episodes": 0, "total_steps": 100}, run_dir)
    files = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    for resume in (False, True):
        wanted = {key: {} for key in ("policy", "model", "data", "train")}
        wanted |= {"env": settings["env"], "resume": resume}
        with pytest.raises(ConfigError, match="holds a run of 'finetune_reinflow', and this is 'pretrain'"):
            pretrain(wanted, run_dir)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    claim(tmp_path / "other", PRETRAINING)
    with pytest.raises(ConfigError, match="holds a run of 'pretrain', and this is 'finetune_reinflow'"):
        finetune(settings, tmp_path / "other")
    (run_dir / STATE_FILE).unlink()
    with pytest.raises(ConfigError, match=f"{STATE_FILE} is gone"):
        finetune({**settings, "resume": True}, run_dir)
