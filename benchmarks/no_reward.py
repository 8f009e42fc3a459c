"""What fine-tuning does to a policy without any reward, and after a single success.

    python benchmarks/no_reward.py            # runs what is missing, writes the JSON
    python benchmarks/no_reward.py --report   # only collects what is there

Hopper's environments answer with a reward of 0 at every step: first 33,600 steps, then until 1.6 million, then one
reward of 1 and zeros again for 20 iterations. After each part the policy is evaluated with Hopper's own rewards on
100 episodes, the same for all. Settings are those of `finetune_reinflow.py env=hopper`, at the full learning rate.
Results go to benchmarks/results/no-reward.json.
"""

from __future__ import annotations

import argparse
import csv
import datetime
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.vec_env import DummyVecEnv

from flowpolicy import FlowPolicy
from flowpolicy.evaluation.rollout import evaluate
from flowpolicy.evaluation.statistics import mean_interval, paired_difference_interval
from flowpolicy.evaluation.summary import git_state, machine, versions
from flowpolicy.evaluation.task import Task
from flowpolicy.files.reading import read_json
from flowpolicy.files.storage import write_json
from flowpolicy.finetuning.chain import kl_divergence
from flowpolicy.finetuning.reinflow import ReinFlow

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "benchmarks" / "no_reward"
RESULT = ROOT / "benchmarks" / "results" / "no-reward.json"
BASE = ROOT / "benchmarks" / "checkpoints" / "hopper-shortcut-seed0"
TASK = Task("hopper", "Hopper-v5")
ENVS, ITERATION = 16, 8192  # environments, environment steps of an iteration
PARTS = {"zeros": 33_600, "many_zeros": 1_600_000, "one_success": 1_600_000 + 21 * ITERATION}


class Silent(gym.Wrapper[Any, Any, Any, Any]):
    """Hopper whose reward is 0, but at one step of one environment 1 where ``armed`` was set."""

    armed = False  # one success for all environments

    def step(self, action: Any) -> Any:
        observation, _, terminated, truncated, info = self.env.step(action)
        reward, Silent.armed = float(Silent.armed), False
        return observation, reward, terminated, truncated, info


def finetune(seed: int) -> None:
    """All parts of one seed, each from the state that the one before left."""
    env = DummyVecEnv([lambda: Silent(TASK.make())] * ENVS)
    model = ReinFlow(FlowPolicy.load(BASE), env, seed=seed)
    for name, steps in PARTS.items():
        folder = RUNS / f"seed{seed}" / name
        state = folder / "state.zip"
        if (folder / "part.json").exists():
            model = ReinFlow.load(state, env)
            continue
        print(f"seed {seed}: {name}, {steps:,} steps", flush=True)
        Silent.armed = name == "one_success"
        updates = model._n_updates
        model.learn(steps - model.num_timesteps, reset_num_timesteps=False)
        folder.mkdir(parents=True, exist_ok=True)
        model.save(state)
        result = evaluate(model.deployed_policy(), TASK, episodes=100, num_envs=50, show_progress=False)
        result.write_csv(folder / "episodes.csv")
        content = {
            "steps": model.num_timesteps, "policy_steps": model._n_updates - updates,
            "return_scale": model.scale.value, "largest_scaled_return": model.scale.largest / model.scale.value,
            **distance(model),
        }  # fmt: skip
        write_json(folder / "part.json", content)


@torch.no_grad()
def distance(model: ReinFlow) -> dict[str, float]:
    """Nats a chunk from the base's chain to the fine-tuned one's, and the largest change of a parameter."""
    tuned = model.actor_critic.flow
    fresh = ReinFlow(FlowPolicy.load(BASE), None, seed=model.seed).actor_critic.flow
    fresh.noise.log_bounds.copy_(tuned.noise.log_bounds)  # these follow a schedule, not the reward
    observation = {key: rows[:1024] for key, rows in model.visited_observations().items()}
    start = torch.randn(1024, 4, 3, generator=torch.Generator().manual_seed(0))
    chain = fresh.sample(observation, start, torch.Generator().manual_seed(0))
    nats = kl_divergence(chain.mean, chain.std, *tuned(observation, chain.x))
    changes = [
        float((one - other).abs().max())
        for one, other in zip(fresh.parameters(), tuned.parameters(), strict=True)
    ]
    return {"kl": float(nats.sum((1, 2, 3)).mean()), "largest_parameter_change": max(changes)}


def report(seeds: list[int]) -> dict[str, Any]:
    """A row per part and seed; what is missing is named."""
    rows, missing = [], []
    base_file = RUNS / "base.csv"
    if not base_file.exists():
        base_file.parent.mkdir(parents=True, exist_ok=True)
        policy = FlowPolicy.load(BASE)
        evaluate(policy, TASK, episodes=100, num_envs=50, num_steps=4).write_csv(base_file)
    base = _returns(base_file)
    for seed in seeds:
        for name in PARTS:
            folder = RUNS / f"seed{seed}" / name
            if not (folder / "part.json").exists():
                missing.append(f"seed{seed}/{name}")
                continue
            after = _returns(folder / "episodes.csv")
            rows.append({
                "part": name, "seed": seed, **read_json(folder / "part.json"), "episodes": len(after),
                "return_mean": float(after.mean()), "return_ci95": list(mean_interval(after)),
                "return_difference": float((after - base).mean()),
                "return_difference_ci95": list(paired_difference_interval(after, base)),
            })  # fmt: skip
    commit, dirty = git_state()
    return {
        "command": "python benchmarks/no_reward.py",
        "complete": not missing, "missing": missing, "base": BASE.name, "settings": "env=hopper, seed by row",
        "base_return": float(base.mean()), "base_return_ci95": list(mean_interval(base)),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(), "versions": versions(), "git_commit": commit, "git_dirty": dirty, "rows": rows,
    }  # fmt: skip


def _returns(path: Path) -> np.ndarray:
    with path.open(newline="") as stream:
        return np.array([float(row["return"]) for row in csv.DictReader(stream)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--report", action="store_true", help="only collect finished parts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for seed in () if arguments.report else arguments.seeds:
        finetune(seed)
    content = report(arguments.seeds)
    write_json(RESULT, content)
    print(
        "| part | seed | steps | policy steps | KL, nats | return | paired difference |\n"
        + "| --- " * 7
        + "|"
    )
    for row in content["rows"]:
        low, high = row["return_difference_ci95"]
        print(
            f"| {row['part']} | {row['seed']} | {row['steps']:,} | {row['policy_steps']} | {row['kl']:.2g} | "
            f"{row['return_mean']:.0f} | {row['return_difference']:+.0f} [{low:.0f}, {high:.0f}] |"
        )


if __name__ == "__main__":
    main()
