"""Two tasks that differ in words alone: one policy does the one that it is told."""

import numpy as np
import torch

from flowpolicy.data.store import Demonstrations
from flowpolicy.evaluation.task import Task
from flowpolicy.models.config import TransformerConfig
from flowpolicy.pretraining.config import DataConfig, TrainConfig
from flowpolicy.pretraining.run import PretrainConfig, make_policy, make_samplers
from flowpolicy.pretraining.trainer import Trainer

WORDS = ("drive to the left", "drive to the right")


def test_the_words_decide():
    rng = np.random.default_rng(0)
    task = np.repeat([0, 1], 200)
    arrays = {
        "observation": rng.normal(size=(400, 2)).astype(np.float32),
        "action": (np.where(task, 1.0, -1.0)[:, None] + rng.normal(size=(400, 1)) / 10).astype(np.float32),
        "task_index": task,
    }
    demos = Demonstrations(arrays, np.arange(20, 401, 20), {"tasks": list(WORDS)})
    model = TransformerConfig(network="transformer", width=16, depth=1, num_heads=2)
    train = TrainConfig(steps=150, batch_size=64, learning_rate=1e-2, warmup_steps=10, ema_decay=0.9)
    data = DataConfig(observation_keys=("observation", "task"), validation_fraction=0.0)
    config = PretrainConfig(env={}, policy={"name": "flow_matching"}, model=model, data=data, train=train)
    torch.manual_seed(0)
    policy = make_policy(config, Task("drive", "none", action_horizon=2, execute_horizon=1), demos)
    trainer = Trainer(policy, make_samplers(policy, demos, data, 0)[0], None, train, seed=0)
    for _ in range(train.steps):
        trainer.step()
    trained = trainer.averaged_policy()
    seen = torch.zeros(32, 1, 2)

    def mean(words):
        return float(trained.act({"observation": seen, "task": words}, generator=torch.manual_seed(0)).mean())

    assert abs(mean(WORDS[0]) + 1) < 0.2
    assert abs(mean(WORDS[1]) - 1) < 0.2
    assert mean("please drive to the right side") > 0.5  # never seen
    assert mean("drve to the left") < -0.5
