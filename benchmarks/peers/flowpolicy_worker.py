"""Our trainer on the same data and sizes; same protocol as the other workers."""

from __future__ import annotations

import json
import sys
import time

import torch

from flowpolicy.data.sampling import ChunkSampler, as_tensors
from flowpolicy.data.store import read_demonstrations
from flowpolicy.models.config import TransformerConfig
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.config import PolicyConfig
from flowpolicy.pretraining.config import TrainConfig
from flowpolicy.pretraining.trainer import Trainer


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    demos = read_demonstrations(settings["store"])
    observation = as_tensors(demos, ["observation"], "cpu")
    action = as_tensors(demos, ["action"], "cpu")["action"]
    model = TransformerConfig(
        width=settings["width"], depth=settings["depth"], num_heads=settings["num_heads"],
        dropout=settings["dropout"], actions_per_token=settings["actions_per_token"],
    )  # fmt: skip
    horizon = settings["action_horizon"]
    policy = FlowPolicy(
        PolicyConfig({"name": "flow_matching"}, model, {"observation": (20,)}, 2, 2, horizon, 8)
    )
    policy.fit_normalizers(observation, action)
    normalized = {
        key: policy.observation_normalizers[key].normalize(value) for key, value in observation.items()
    }
    chunks = ChunkSampler(
        normalized, policy.action_normalizer.normalize(action), demos.episode_ends, 2, horizon
    )
    config = TrainConfig(
        batch_size=settings["batch_size"], steps=1_000_000, learning_rate=1e-4,
        precision=settings["precision"],
    )  # fmt: skip
    trainer = Trainer(policy, chunks, None, config)
    print(json.dumps({"parameters": policy.num_parameters()}), flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        for _ in range(int(line)):
            float(trainer.step()["loss/total"])
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main()
