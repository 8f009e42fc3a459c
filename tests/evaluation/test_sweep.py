"""An evaluation says how it was played."""

import pytest

pytest.importorskip("matplotlib")

from flowpolicy.evaluation.sweep import EvaluationConfig, evaluate_sweep
from flowpolicy.models.config import TransformerConfig
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.config import PolicyConfig


@pytest.mark.parametrize(("horizon", "label"), [(4, ""), (2, " (T_e = 2 and not 4)")])
def test_another_execution_horizon_is_named_wherever_there_are_figures(tmp_path, monkeypatch, horizon, label):
    model = TransformerConfig(width=16, depth=1, num_heads=2)
    config = PolicyConfig({"name": "flow_matching"}, model, {"observation": (3,)}, 1, 1, 4, 4)
    FlowPolicy(config).save(tmp_path / "policy")
    settings = EvaluationConfig(str(tmp_path / "policy"), num_steps=1, episodes=2, num_envs=2, device="cpu")
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
