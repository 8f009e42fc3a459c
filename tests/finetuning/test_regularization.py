from unittest import mock

import pytest
import torch

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")

from toy_practice import make_policy

from flowpolicy.data.sampling import ChunkSampler
from flowpolicy.finetuning.chain import NoisyFlow
from flowpolicy.finetuning.config import SelfDistillationConfig
from flowpolicy.finetuning.noise import NoiseConfig
from flowpolicy.finetuning.regularization import BehaviourCloning, Wasserstein
from flowpolicy.finetuning.rules import Minibatch
from flowpolicy.finetuning.self_distillation import self_distill
from flowpolicy.flow.sampler_spec import SamplerSpec


def minibatch(count=6, steps=2):
    torch.manual_seed(1)
    shape = (count, steps, 4, 2)
    return Minibatch(
        {"observation": torch.rand(count, 1, 2)}, torch.randn(count, steps + 1, 4, 2), torch.zeros(shape),
        torch.ones(shape), torch.ones(count, steps, 4, 1), torch.zeros(count), torch.zeros(count),
    )  # fmt: skip


def test_wasserstein_compares_chunks_of_the_same_noise():
    policy = make_policy(action_normalization="gaussian", action_clip=50.0)  # nothing is clamped
    flow = NoisyFlow(policy, 2, NoiseConfig())
    term, batch = Wasserstein(flow.frozen_copy(), 0.5), minibatch()
    # Two runs of one flow from one x_0 agree exactly; a first run that changed x_0 in place would show here.
    assert term.loss(flow, batch, torch.Generator().manual_seed(0)) == 0
    with torch.no_grad():
        flow.network.output.bias += 0.01  # adds 0.01 to the velocity, so 0.01 to the chunk
    loss = term.loss(flow, batch, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(0.01**2, rel=0.1)
    loss.backward()
    assert flow.network.output.bias.grad.abs().max() > 0
    assert all(p.grad is None for p in term.reference.parameters())


def test_behaviour_cloning_is_the_pretraining_loss_on_demonstrations():
    policy = make_policy()
    flow, batch = NoisyFlow(policy, 2, NoiseConfig()), minibatch()
    torch.manual_seed(2)
    demonstrations = ChunkSampler({"observation": torch.rand(30, 2)}, torch.rand(30, 2), [12, 30], 1, 4)
    term = BehaviourCloning(policy.objective, demonstrations, 1.0)
    found = term.loss(flow, batch, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    index = torch.randint(len(demonstrations), (6,), generator=generator)
    draws = policy.objective.draw((6, 4, 2), generator, torch.device("cpu"))
    expected, _ = policy.objective.loss(policy.network, demonstrations.batch(index), draws, None)
    assert found.item() == pytest.approx(expected.item())
    assert found.requires_grad


@pytest.mark.parametrize("objective", ["shortcut", "flow_matching"])
def test_distillation_teaches_the_other_steps_what_the_tuned_ones_do(objective):
    # What fine-tuning may leave behind: at K = 2 the flow gives +0.6 everywhere, at other K something else.
    tuned = make_policy(objective=objective, tuned=SamplerSpec(num_steps=2, solver="euler"))
    target = 0.6

    original = type(tuned.objective).sample

    def sample(self, velocity, noise, spec):
        sampled = original(self, velocity, noise, spec)
        return 0 * sampled + target if spec.steps == 2 else sampled

    observation = {"observation": torch.rand(128, 1, 2, generator=torch.Generator().manual_seed(5))}
    with mock.patch.object(type(tuned.objective), "sample", sample):
        config = SelfDistillationConfig(steps=80, batch_size=32, learning_rate=2e-2)
        student = self_distill(tuned, observation, config, seed=0)
    assert student.config.tuned is None
    noise = torch.randn(128, 4, 2, generator=torch.Generator().manual_seed(6))
    for steps in (1, 2, 4, 32):
        error = (student.act(observation, noise=noise, num_steps=steps) - target).abs().mean()
        untaught = tuned.act(observation, noise=noise, num_steps=steps, allow_any_steps=True)
        assert error < 0.15 < 0.4 < (untaught - target).abs().mean(), steps
