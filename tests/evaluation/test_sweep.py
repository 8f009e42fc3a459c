"""An evaluation says how it was played."""

import pytest
import torch

pytest.importorskip("matplotlib")

from flowpolicy.evaluation.sweep import EvaluationConfig, evaluate_sweep
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.models.config import TransformerConfig
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.config import PolicyConfig
from flowpolicy.policy.fingerprint import fingerprint
from flowpolicy.policy.searched import SearchedSampling


def saved(folder):
    model = TransformerConfig(width=16, depth=1, num_heads=2)
    policy = FlowPolicy(PolicyConfig({"name": "flow_matching"}, model, {"observation": (3,)}, 1, 1, 4, 4))
    for parameter in policy.network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    policy.save(folder / "policy")
    return str(folder / "policy")


def test_a_policy_is_sampled_with_the_solver_and_grid_that_are_asked_for(tmp_path):
    checkpoint, grid = saved(tmp_path), {"name": "given", "times": [0.0, 0.7, 1.0]}
    sampling = SamplerSpec(num_steps=2, solver="midpoint", grid=grid)
    file = SearchedSampling(fingerprint(FlowPolicy.load(checkpoint)), sampling).save(tmp_path / "s.json")
    env = {"name": "p", "env_id": "Pendulum-v1"}

    def returns(**settings):
        config = EvaluationConfig(checkpoint, episodes=1, num_envs=1, device="cpu", **settings)
        found = evaluate_sweep(config, tmp_path, env)
        return {steps: (result.nfe, result.returns.item()) for steps, result in found.results.items()}

    searched = returns(solver=str(file))
    assert searched == returns(num_steps=2, solver="midpoint", grid=grid)
    assert searched[2][0] == 4
    assert searched != returns(num_steps=2, solver="midpoint", k_sweep=(1,)) != returns(num_steps=2)


@pytest.mark.parametrize(("horizon", "label"), [(4, ""), (2, " (T_e = 2 and not 4)")])
def test_another_execution_horizon_is_named_wherever_there_are_figures(tmp_path, monkeypatch, horizon, label):
    settings = EvaluationConfig(saved(tmp_path), num_steps=1, episodes=2, num_envs=2, device="cpu")
    env = {"name": "p", "env_id": "Pendulum-v1", "execute_horizon": horizon}
    found = evaluate_sweep(settings, tmp_path, env)
    assert found.policy == f"flow_matching{label}"
    assert found.metrics()["execute_horizon"] == horizon
    header, _, row = found.table().splitlines()
    assert dict(zip(header.split(), row.split(), strict=False))["T_e"] == str(horizon)
    titles = []
    monkeypatch.setattr(
        "flowpolicy.plots.evaluation.plot_returns",
        lambda *_, title, **__: titles.append(title) or tmp_path / "returns.png",
    )
    found.write(tmp_path)
    assert f"T_e = {horizon}" in titles[0]
