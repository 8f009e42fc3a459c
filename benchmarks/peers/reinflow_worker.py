"""Runs the published ReinFlow code's own agent, networks and Hopper settings on synthetic observations.

    python benchmarks/peers/reinflow_worker.py '{"checkout": PATH, "num_envs": 40, "chunks": 25}'

PATH is a checkout of ReinFlow/ReinFlow (MIT licence); nothing of it is copied, only imported. The Python needs
torch, hydra-core, omegaconf, wandb, psutil, matplotlib, einops and tqdm, and neither gym nor mujoco-py. The first
answer is one JSON line with the sizes. Then each line on stdin is answered by the seconds its work took:

    rollout N   N times what the agent's loop does with the observations of all environments: NumPy observations
                to tensors, the critic's values, the denoising chains and their likelihoods, all back to NumPy
    update N    N times `agent_update()`, that is `epochs` epochs over a buffer of `chunks` x `num_envs` chunks

What is not as published, and why:

- The rollout integrates on linspace(0, 1, K) while the likelihood is scored on linspace(0, 1 - 1/K, K); the agent
  notices at its first minibatch (a ratio that is not 1) and stops. The rollout's grid is replaced in memory by the
  scoring one.
- No environment is built (the stub below); observations, rewards and the networks' weights are random.
- Only CPU; no W&B; sizes, epochs and `repeat_samples` as asked. The minibatch keeps the published 2.5 rows per
  chunk of the buffer (50000 for 40 x 500) unless it is given.
- Before each update, outside the time measured, the networks go back to the weights that filled the buffer: the
  agent refuses a first ratio other than 1.

`"repeat_samples": false` is the checkout's own other sampler, without duplicated rows; its epoch is one pass over
the chunks in minibatches of `minibatch` rows, so give that size too.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

PUBLISHED: dict[str, Any] = {
    "config": "cfg/gym/finetune/hopper-v2/ft_ppo_reflow_mlp.yaml",
    "num_envs": 40,
    "chunks": 500,
    "minibatch": None,
    "epochs": 5,
    "repeat_samples": True,
    "threads": 1,
}
ROWS_PER_CHUNK = 2.5  # of a minibatch, published: 50000 rows drawn from 40 x 500 chunks
DUPLICATES = 10  # rows of an epoch per chunk when repeat_samples is on, fixed inside the checkout


class NoEnvironments:
    """Stands where the agent expects its vector environment, which it only seeds while being built."""

    def seed(self, seeds: list[int]) -> None:
        pass


def agent_config(settings: dict[str, Any], folder: str) -> DictConfig:
    """The checkout's own YAML with the sizes asked for, and with everything outside the computation switched off."""
    os.environ.setdefault("REINFLOW_LOG_DIR", folder)
    os.environ.setdefault("REINFLOW_DATA_DIR", folder)
    OmegaConf.register_new_resolver("eval", lambda text: math.prod(int(part) for part in text.split("*")))
    config = OmegaConf.load(Path(settings["checkout"]) / settings["config"])
    rows = settings["minibatch"] or math.ceil(ROWS_PER_CHUNK * settings["num_envs"] * settings["chunks"])
    changes = {
        "device": "cpu",
        "sim_device": "cpu",
        "logdir": folder,
        "wandb": None,
        "model.actor_policy_path": None,
        "env.n_envs": settings["num_envs"],
        "train.n_steps": settings["chunks"],
        "train.batch_size": rows,
        "train.update_epochs": settings["epochs"],
        "train.repeat_samples": settings["repeat_samples"],
        "train.logprob_batch_size": settings["num_envs"],  # unused for flows, but must be a multiple of it
    }
    for key, value in changes.items():
        OmegaConf.update(config, key, value)
    return config


def patch_time_grid(model_class: Any) -> None:
    """Lets the rollout integrate on the grid on which the likelihood is scored."""
    source = textwrap.dedent(inspect.getsource(model_class.get_actions))
    published = "torch.linspace(0,1,self.inference_steps)"
    if source.count(published) != 1:
        raise SystemExit(f"{model_class.__name__}.get_actions has no {published}: is this another version?")
    source = source.replace(published, "torch.linspace(0,1-1/self.inference_steps,self.inference_steps)")
    scope: dict[str, Any] = {}
    exec(compile(source, "get_actions, patched", "exec"), vars(sys.modules[model_class.__module__]), scope)
    model_class.get_actions = scope["get_actions"]


def build_agent(settings: dict[str, Any], folder: str) -> Any:
    sys.path.insert(0, settings["checkout"])
    config = agent_config(settings, folder)
    agent_class = get_class(config["_target_"])
    sys.modules["agent.finetune.reinflow.train_agent"].make_async = lambda *_, **__: NoEnvironments()  # type: ignore[attr-defined]
    patch_time_grid(get_class(config["model"]["_target_"]))
    agent = agent_class(config)
    agent.eval_mode = False
    agent.model.train()
    return agent


@torch.no_grad()
def infer(agent: Any, observation: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One turn of the agent's rollout without the environments: actions, chains, log-likelihoods and values."""
    condition = {"state": torch.tensor(observation, device=agent.device, dtype=torch.float32)}
    value = agent.get_value(cond=condition)
    samples, chains, log_likelihood = agent.get_samples_logprobs(
        cond=condition,
        normalize_denoising_horizon=agent.normalize_denoising_horizon,
        normalize_act_space_dimension=agent.normalize_act_space_dim,
        clip_intermediate_actions=agent.clip_intermediate_actions,
        account_for_initial_stochasticity=agent.account_for_initial_stochasticity,
    )
    return samples[:, : agent.act_steps], chains, log_likelihood, value


class Work:
    """The agent, one batch of observations, and a buffer that is filled when the first update is asked for."""

    def __init__(self, agent: Any) -> None:
        self.agent = agent
        self.rng = np.random.default_rng(0)
        self.observation = self._observe()
        self.weights: dict[str, torch.Tensor] | None = None
        self.optimizer_steps = 0
        agent.actor_optimizer.register_step_post_hook(self._count)

    def rollout(self, calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            infer(self.agent, self.observation)
        return time.perf_counter() - started

    def update(self, passes: int) -> float:
        if self.weights is None:
            self._fill_buffer()
            self.weights = copy.deepcopy(self.agent.model.state_dict())
        seconds = 0.0
        for _ in range(passes):
            self.agent.model.load_state_dict(self.weights)
            self.optimizer_steps = 0
            started = time.perf_counter()
            self.agent.agent_update(verbose=self.agent.verbose)
            seconds += time.perf_counter() - started
            if self.optimizer_steps != self.expected_steps():
                raise SystemExit(f"the update stopped after {self.optimizer_steps} optimizer steps")
        return seconds

    def rows(self) -> int:
        """Rows of one epoch, duplicates included."""
        chunks: int = self.agent.n_envs * self.agent.n_steps
        return chunks * DUPLICATES if self.agent.repeat_samples else chunks

    def expected_steps(self) -> int:
        return self.agent.update_epochs * math.ceil(self.rows() / self.agent.batch_size)

    def about(self) -> dict[str, Any]:
        agent, model = self.agent, self.agent.model
        chunks = agent.n_envs * agent.n_steps
        rows, minibatch = self.rows(), min(agent.batch_size, self.rows())
        copies = rows // chunks
        absent = math.prod((rows - minibatch - i) / (rows - i) for i in range(copies))
        return {
            "parameters": count(model.actor_ft.policy),
            "noise_parameters": count(model.actor_ft.explore_noise_net),
            "critic_parameters": count(model.critic),
            "num_steps": model.inference_steps,
            "num_envs": agent.n_envs,
            "action_horizon": agent.horizon_steps,
            "unique_chunks": chunks,
            "unique_transitions": chunks * model.inference_steps,
            "environment_steps": chunks * agent.act_steps,
            "epochs": agent.update_epochs,
            "rows_per_epoch": rows,
            "minibatch_rows": minibatch,
            "minibatch_unique_chunks": round(chunks * (1 - absent)),
            "optimizer_steps_per_update": self.expected_steps(),
            "time_grid": "patched",
        }

    def _observe(self) -> np.ndarray:
        """Random observations in the range of the agent's normaliser."""
        shape = (self.agent.n_envs, self.agent.n_cond_step, self.agent.obs_dim)
        return self.rng.uniform(-1.0, 1.0, shape)

    def _fill_buffer(self) -> None:
        agent, never = self.agent, np.zeros(self.agent.n_envs, bool)
        agent.init_buffer()
        agent.buffer.reset()
        agent.buffer.firsts_trajs[0] = 1
        for step in range(agent.n_steps):
            observation = self._observe()
            _, chains, log_likelihood, value = infer(agent, observation)
            reward = self.rng.normal(size=agent.n_envs)
            agent.buffer.add(step, observation, chains, reward, never, never, value, log_likelihood)
        agent.buffer.update({"state": self._observe()}, agent.model.critic)

    def _count(self, *_: Any) -> None:
        self.optimizer_steps += 1


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def commit(checkout: str) -> str:
    command = ["git", "-C", checkout, "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # the checkout prints; only answers may reach stdout
    asked = json.loads(sys.argv[1])
    unknown = asked.keys() - PUBLISHED.keys() - {"checkout"}
    if unknown or "checkout" not in asked:
        raise SystemExit(
            f"give a checkout, and of the rest only {sorted(PUBLISHED)}; unknown: {sorted(unknown)}"
        )
    settings = {**PUBLISHED, **asked}
    torch.set_num_threads(settings["threads"])
    with tempfile.TemporaryDirectory() as folder:
        work = Work(build_agent(settings, folder))
    about = {**work.about(), "threads": settings["threads"], "commit": commit(settings["checkout"])}
    print(json.dumps(about), file=answers, flush=True)
    modes = {"rollout": work.rollout, "update": work.update}
    for line in sys.stdin:
        mode, times = line.split()
        print(modes[mode](int(times)), file=answers, flush=True)


if __name__ == "__main__":
    main()
