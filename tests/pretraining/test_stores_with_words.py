import numpy as np
import torch
from test_several_stores import settings, toy_demonstrations

from flowpolicy import FlowPolicy
from flowpolicy.data.store import Demonstrations, write_demonstrations
from flowpolicy.pretraining.run import pretrain


def test_stores_with_other_tables_of_tasks_make_one_policy_that_reads_words(tmp_path, monkeypatch):
    monkeypatch.setattr("flowpolicy.pretraining.training_run.TrainingRun._plot", lambda *_: None)
    demos = toy_demonstrations(4, 12)
    for name, tasks in (("a", ["lift", "push"]), ("b", ["open", "lift"]), ("c", None)):
        arrays, attributes = dict(demos.arrays), {}
        if tasks:
            arrays["task_index"] = np.repeat([0, 1], 24)
            attributes["tasks"] = tasks
        write_demonstrations(
            tmp_path / f"{name}.zarr", Demonstrations(arrays, demos.episode_ends, attributes)
        )
    paths = [str(tmp_path / f"{name}.zarr") for name in "abc"]
    pretrain(settings(paths, keys=("observation", "task")), tmp_path / "run")
    policy = FlowPolicy.load(tmp_path / "run" / "checkpoint")
    assert list(policy.spec.features) == ["observation", "task", "task.present"]
    assert set(policy.spec.features["task"].known) == {"lift", "push", "open", ""}
    observation, noise = {"observation": np.zeros((1, 1, 3))}, torch.zeros(1, *policy.spec.chunk_shape)
    chunks = [policy.act({**observation, "task": word}, noise=noise) for word in ("lift", "open")]
    assert not torch.equal(*chunks)
    assert torch.equal(
        policy.act(observation, noise=noise),
        policy.act({**observation, "task": "", "task.present": np.zeros((1, 1))}, noise=noise),
    )
