import json

import numpy as np
import pytest
import torch
from toy_training import toy_demonstrations, toy_settings

from flowpolicy import CheckpointError, ConfigError, DataError, FlowPolicy
from flowpolicy.data.store import Demonstrations, write_demonstrations
from flowpolicy.execution.history import HistoryBuffer
from flowpolicy.pretraining.run import pretrain
from flowpolicy.runs.loggers import read_metrics


def write(path, *, force=False, shift=0.0, episodes=6):
    demos = toy_demonstrations(episodes, 12)
    arrays = dict(demos.arrays)
    arrays["action"] = arrays["action"] + np.float32(shift)
    if force:
        arrays["force"] = np.linspace(2, 4, len(arrays["action"]), dtype=np.float32)[:, None]
    write_demonstrations(path, Demonstrations(arrays, demos.episode_ends))
    return str(path)


@pytest.fixture
def no_figures(monkeypatch):
    """Curves are drawn elsewhere, and take most of the time of so short a run."""
    monkeypatch.setattr("flowpolicy.pretraining.training_run.TrainingRun._plot", lambda *_: None)


def settings(paths, *, keys=("observation",), init=None, train=None, **data):
    result = toy_settings(**{"steps": 4, "batch_size": 8, "validate_every": 2, **(train or {})})
    data = {"path": list(paths), "observation_keys": list(keys), "validation_fraction": 0.2, **data}
    return {**result, "data": data, "init": init}


def test_a_mixture_is_trained_on_and_told_of(tmp_path):
    paths = write(tmp_path / "old.zarr", force=True), write(tmp_path / "corrections.zarr", episodes=3)
    given = settings(paths, keys=("observation", "force"), weights=[1, 3])
    summary = json.loads(pretrain(given, tmp_path / "run").read_text())
    mixture = summary["metrics"]["mixture"]
    assert [about["share"] for about in mixture.values()] == [0.25, 0.75]
    assert [about["episodes"] for about in mixture.values()] == [6, 3]
    last = read_metrics(tmp_path / "run" / "metrics.csv")[-1]
    for name in ("old", "corrections"):
        error = last[f"validation/action_error/{name}"]
        assert error > 0
        assert summary["metrics"][f"validation/action_error/{name}"] == error

    policy = FlowPolicy.load(tmp_path / "run" / "checkpoint")
    assert list(policy.spec.features) == ["observation", "force", "force.present"]
    normalizer = policy.observation_normalizers["force"]
    assert (normalizer.center, normalizer.scale) == (pytest.approx(3), pytest.approx(1))  # of what was there
    observation, noise = {"observation": np.zeros((1, 1, 3))}, torch.zeros(1, *policy.spec.chunk_shape)
    without = policy.act(observation, noise=noise)
    explicit = {**observation, "force": np.zeros((1, 1, 1)), "force.present": np.zeros((1, 1))}
    assert torch.equal(policy.act(explicit, noise=noise), without)
    assert not torch.equal(policy.act({**observation, "force": np.zeros((1, 1, 1))}, noise=noise), without)
    policy.spec.check("A robot", {"observation": (3,)}, (1,))
    history = HistoryBuffer.of_features(policy.spec.features, 1, 1)
    history.add({"observation": np.zeros((1, 3))})
    assert torch.equal(policy.act(history.copy(), noise=noise), without)


@pytest.mark.usefixtures("no_figures")
def test_a_resumed_mixture_is_the_unbroken_one(tmp_path):
    paths = write(tmp_path / "a.zarr"), write(tmp_path / "b.zarr", shift=1.0)
    whole, broken = (settings(paths, weights=[1, 2], train={"save_every": 2}) for _ in range(2))
    pretrain(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        interrupted(broken, tmp_path / "run")
    pretrain({**broken, "resume": True}, tmp_path / "run")
    first, second = (FlowPolicy.load(tmp_path / name / "checkpoint") for name in ("whole", "run"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def interrupted(given, run_dir):
    from flowpolicy.pretraining.trainer import Trainer

    steps = Trainer.step

    def step(trainer):
        if trainer.state.step == 3:
            raise KeyboardInterrupt
        return steps(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        pretrain(given, run_dir)


@pytest.mark.usefixtures("no_figures")
def test_each_store_may_have_normalisers_of_its_own(tmp_path):
    paths = write(tmp_path / "a.zarr"), write(tmp_path / "b.zarr", shift=10.0)
    pretrain(settings(paths, normalizers="each"), tmp_path / "run")
    first, a, b = (
        FlowPolicy.load(tmp_path / "run" / name) for name in ("checkpoint", "checkpoint_a", "checkpoint_b")
    )
    assert torch.equal(first.action_normalizer.center, a.action_normalizer.center)
    assert (b.action_normalizer.center - a.action_normalizer.center).item() == pytest.approx(10, abs=1e-3)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.usefixtures("no_figures")
def test_training_starts_from_a_checkpoint_as_the_same_function(tmp_path):
    old, new = write(tmp_path / "old.zarr"), write(tmp_path / "new.zarr", shift=0.5)
    pretrain(settings([old]), tmp_path / "first")
    start = tmp_path / "first" / "checkpoint"
    still = settings([old, new], init=str(start), train={"learning_rate": 1e-30, "weight_decay": 0.0})
    pretrain(still, tmp_path / "second")
    before, after = (FlowPolicy.load(path) for path in (start, tmp_path / "second" / "checkpoint"))
    observation, noise = {"observation": torch.rand(4, 1, 3)}, torch.randn(4, *before.spec.chunk_shape)
    chunks = [policy.act(observation, noise=noise) for policy in (before, after)]
    assert torch.allclose(*chunks, atol=1e-6)
    assert after.config.metadata["init"] == str(start)
    refitted = settings([old, new], init=str(start), normalizers="shared")
    pretrain(refitted, tmp_path / "third")
    third = FlowPolicy.load(tmp_path / "third" / "checkpoint")
    assert third.action_normalizer.scale > before.action_normalizer.scale


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policy": {"name": "regression"}}, "objective 'flow_matching'.*'regression'"),
        ({"model": {"width": 32, "depth": 1, "num_heads": 2, "tokens_per_step": 1}}, "shape"),
        ({"env": {"name": "toy", "env_id": "Pendulum-v1", "action_horizon": 8}}, "action horizon of 4"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(tmp_path, change, words):
    store = write(tmp_path / "old.zarr")
    given = settings([store], train={"validate_every": 0})
    pretrain({**given, "train": {**given["train"], "steps": 1}}, tmp_path / "first")
    with pytest.raises(CheckpointError, match=words):
        pretrain({**given, **change, "init": str(tmp_path / "first" / "checkpoint")}, tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_wrong_lists_are_refused(tmp_path):
    store = write(tmp_path / "a.zarr")
    with pytest.raises(ConfigError, match=r"data\.weights is .* one weight for each of the 2 stores"):
        pretrain(settings([store, store], weights=[1]), tmp_path / "run")
    with pytest.raises(DataError, match=r"No store of .* has 'camera'"):
        pretrain(settings([store, store], keys=("observation", "camera")), tmp_path / "run")
