"""Training on a GPU: steps captured in a CUDA graph do what steps without one do."""

import logging

import pytest
import torch
from toy_training import toy_trainer

from flowpolicy.features.vision.config import VisionConfig
from flowpolicy.features.vision.encoder import ImageEncoder
from flowpolicy.flow.flow_matching import FlowMatching
from flowpolicy.pretraining.captured import CapturedBackward
from flowpolicy.pretraining.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
STEPS = 12


def gpu_trainer(policy="flow_matching", precision="float32", **settings):
    """The toy trainer, moved to the GPU."""
    made = toy_trainer(policy, precision=precision, **settings)
    chunks = made.training
    for name, value in vars(chunks).items():
        if isinstance(value, torch.Tensor):
            setattr(chunks, name, value.cuda())
    chunks.observation = {key: value.cuda() for key, value in chunks.observation.items()}
    return Trainer(made.policy.to("cuda"), chunks, None, made.config)


def steps(trainer):
    return [{name: float(value) for name, value in trainer.step().items()} for _ in range(STEPS)]


@pytest.mark.parametrize("policy", ["flow_matching", "shortcut", "regression", "mip"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_captured_step_is_the_step(policy, dropout, monkeypatch):
    captured = gpu_trainer(policy, dropout=dropout)
    with_graph = steps(captured)
    assert isinstance(captured._backward, CapturedBackward)
    monkeypatch.setattr(Trainer, "_made_backward", lambda self, batch, draws: self.backward)
    eager = gpu_trainer(policy, dropout=dropout)
    for ours, wanted in zip(with_graph, steps(eager), strict=True):
        assert ours == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    for name, weight in captured.policy.state_dict().items():
        torch.testing.assert_close(weight, eager.policy.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_bfloat16_learns_too():
    losses = steps(gpu_trainer(precision="bfloat16", learning_rate=1e-2))
    assert losses[-1]["loss/total"] < losses[0]["loss/total"]


def test_a_loss_that_draws_on_the_cpu_is_not_captured(monkeypatch, caplog):
    own_loss = FlowMatching.loss

    def loss(self, network, batch, draws, teacher=None):
        value, metrics = own_loss(self, network, batch, draws, teacher)
        return value * torch.rand(()).item(), metrics

    monkeypatch.setattr(FlowMatching, "loss", loss)
    trainer = gpu_trainer()
    with caplog.at_level(logging.WARNING):
        steps(trainer)
    assert not isinstance(trainer._backward, CapturedBackward)
    assert "draws random numbers on the CPU" in caplog.text


def test_crops_on_the_gpu_are_windows_of_each_row():
    encoder = ImageEncoder((48, 48, 3), 1, 16, VisionConfig(crop=0.75)).cuda().train()
    place = torch.arange(48 * 48, dtype=torch.float32).view(1, 1, 48, 48, 1)
    images = place.expand(8, 2, 48, 48, 3).cuda()
    cropped = encoder._cropped(images)
    assert cropped.shape == (8, 2, 36, 36, 3)
    corners = cropped[:, :1, :1, :1, :1]
    window = (torch.arange(36)[:, None] * 48 + torch.arange(36)).cuda()
    assert torch.equal(cropped, (corners + window[None, None, :, :, None]).expand_as(cropped))
    assert len(corners.unique()) > 1


def test_colours_that_vary_are_captured_and_drawn_anew_at_each_replay():
    config = VisionConfig(crop=0.75, jitter=(0.3, 0.4, 0.5))
    encoder = ImageEncoder((48, 48, 3), 1, 16, config).cuda().train()
    images = torch.randint(256, (4, 1, 48, 48, 3), dtype=torch.uint8, device="cuda")
    encoder(images)  # libraries choose their kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        tokens = encoder(images)
    graph.replay()
    first = tokens.clone()
    graph.replay()
    assert torch.isfinite(tokens).all()
    assert not torch.equal(tokens, first)
