"""From pairs to a checkpoint, by the trainer that every policy is trained with."""

import json

import pytest
import torch
from toy_preferences import write_toy_pairs
from toy_training import toy_settings, toy_trainer

from flowpolicy import FlowPolicy, FlowPolicyError
from flowpolicy.preferences.run import finetune_preferences
from flowpolicy.pretraining.training_run import TrainingRun


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy and pairs."""
    folder = tmp_path_factory.mktemp("preferences")
    toy_trainer("flow_matching", steps=1).policy.save(folder / "checkpoint")
    write_toy_pairs(folder / "toy.zarr", count=10, frames=False)
    return folder


def settings(folder, **changes):
    toy = toy_settings()
    train = {**toy["train"], "steps": 8, "save_every": 4, "validate_every": 4, "log_every": 4}
    return {
        "env": toy["env"], "checkpoint": str(folder / "checkpoint"), "pairs": str(folder / "toy.zarr"),
        "loss": {"name": "flow_dpo"}, "data": toy["data"], "train": train, "video": False, "device": "cpu",
        **changes,
    }  # fmt: skip


def test_the_result_is_an_ordinary_policy_and_a_resumed_run_the_unbroken_one(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(TrainingRun, "_plot", lambda *_: None)
    given = settings(folder)
    summary = json.loads(finetune_preferences(given, tmp_path / "whole").read_text())
    assert summary["metrics"]["loss"] == "flow_dpo"
    assert 0 < summary["metrics"]["pairs"] <= 8
    steps = []

    def log(self, metrics):
        steps.append(self.state.step)
        if self.state.step > 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("flowpolicy.pretraining.trainer.Trainer._log", log)
        with pytest.raises(KeyboardInterrupt):
            finetune_preferences(given, tmp_path / "run")
    finetune_preferences({**given, "resume": True}, tmp_path / "run")
    first, second = (
        (tmp_path / name / "checkpoint" / "model.safetensors").read_bytes() for name in ("whole", "run")
    )
    assert first == second
    after, before = (FlowPolicy.load(path / "checkpoint") for path in (tmp_path / "run", folder))
    assert after.sampling == before.sampling
    assert after.spec.metadata["preferences"]["label"] == "return"
    noise = torch.randn((1, 4, 1), generator=torch.Generator().manual_seed(0))
    observation = torch.zeros(1, 1, 3)
    assert not torch.equal(*(policy.act(observation, noise=noise) for policy in (after, before)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": {"name": "flow_dop"}}, r"loss is 'flow_dop' \(did you mean 'flow_dpo'"),
        ({"loss": {"name": "flow_dpo", "beta": 0}}, "loss.beta is 0"),
        ({"label": "page"}, "label more of them"),
        ({"pairs": "nowhere.zarr"}, "No demonstrations at nowhere.zarr"),
        ({"train": {"batch_size": 15}}, "train.batch_size is 15; it must be even"),
    ],
)
def test_mistakes_are_refused_before_any_work(tmp_path, folder, change, words):
    with pytest.raises(FlowPolicyError, match=words):
        finetune_preferences(settings(folder, **change), tmp_path / "run")
    assert not (tmp_path / "run" / "training_state").exists()
