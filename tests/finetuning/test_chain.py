"""The likelihood of the denoising chain is exact."""

import dataclasses
import math

import pytest
import torch

from flowpolicy.errors import ConfigError
from flowpolicy.finetuning.chain import NoisyFlow, entropy, kl_divergence, log_prob, transition_mask
from flowpolicy.finetuning.noise import NoiseConfig
from flowpolicy.finetuning.rules import PPO, Minibatch, TempFlow
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.models.config import MLPConfig, TransformerConfig
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.config import PolicyConfig

B, T, A, T_O = 6, 4, 3, 2


def make(
    objective="shortcut", num_steps=4, *, dtype=torch.float64, action_dim=A, horizon=T, model=None, grid=None,
    **noise,
):  # fmt: skip
    torch.manual_seed(0)
    model = model or TransformerConfig(width=16, depth=2, num_heads=2, dropout=0.3)
    config = PolicyConfig(
        {"name": objective}, model, {"observation": (5,)}, action_dim, T_O, horizon, horizon
    )
    policy = FlowPolicy(config)
    for parameter in policy.network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    flow = NoisyFlow(policy, num_steps, NoiseConfig(**noise), grid).to(dtype).eval()
    for parameter in flow.noise.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return policy, flow


def sampled(flow, dtype=torch.float64, batch=B, action_dim=A, horizon=T):
    generator = torch.Generator().manual_seed(1)
    observation = {"observation": torch.randn(batch, T_O, 5, generator=generator, dtype=dtype)}
    start = torch.randn(batch, horizon, action_dim, generator=generator, dtype=dtype)
    return observation, flow.sample(observation, start, generator)


def minibatch(observation, chain, executed=None, advantage=None):
    count = len(chain.x)
    executed = torch.full((count,), chain.x.shape[2]) if executed is None else executed
    mask = transition_mask(executed, chain.mean.shape[1], chain.x.shape[2])
    advantage = torch.linspace(-1, 1, count, dtype=chain.x.dtype) if advantage is None else advantage
    return Minibatch(observation, chain.x, chain.mean, chain.std, mask, advantage, torch.zeros(count))


@pytest.mark.parametrize("objective", ["shortcut", "flow_matching"])
@pytest.mark.parametrize("num_steps", [1, 2, 4])
@pytest.mark.parametrize(
    ("model", "sees_chunk"),
    [
        (None, False),
        (TransformerConfig(width=16, depth=2, num_heads=2, actions_per_token=3), True),
        (MLPConfig(width=16, depth=2, hidden=24), False),
    ],
)
def test_scoring_repeats_what_was_sampled(objective, num_steps, model, sees_chunk):
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-5 * math.sqrt(num_steps * T * A))):
        _, flow = make(objective, num_steps, dtype=dtype, model=model, sees_chunk=sees_chunk)
        observation, chain = sampled(flow, dtype)
        mean, std = flow(observation, chain.x)
        recomputed = log_prob(chain.x, mean, std).sum((1, 2, 3))
        recorded = log_prob(chain.x, chain.mean, chain.std).sum((1, 2, 3))
        assert (recomputed - recorded).abs().max() < bound


@pytest.mark.parametrize("reduction", ["joint", "per_step", "mean"])
def test_the_ratio_of_an_unchanged_policy_is_one(reduction):
    _, flow = make()
    observation, chain = sampled(flow)
    _, metrics = PPO(reduction=reduction).loss(flow, minibatch(observation, chain))
    assert metrics["train/ratio_spread"] < 1e-9
    assert metrics["train/clip_fraction"] == 0
    assert metrics["train/kl"].abs() < 1e-9


@pytest.mark.parametrize("reduction", ["joint", "per_step", "mean"])
def test_loss_and_gradient_of_ppo_are_those_of_a_computation_by_hand(reduction):
    """A chunk, and for each of its ratios, at a time."""
    rule = PPO(clip_range=0.1, reduction=reduction, entropy_coefficient=0.01)
    _, flow = make(num_steps=2)
    observation, chain = sampled(flow)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(0.97)
    executed = torch.arange(B) % T + 1
    batch = minibatch(observation, chain, executed)
    loss, metrics = rule.loss(flow, batch)
    mean, std = flow(observation, chain.x)
    by_hand, clipped, ratios = 0.0, 0, 2 if reduction == "per_step" else 1
    for i, count in enumerate(executed.tolist()):
        steps, bonus = [], 0.0
        for k, tokens in enumerate((slice(T), slice(count))):
            new, old = (
                torch.distributions.Normal(m[i, k, tokens], s[i, k, tokens])
                for m, s in ((mean, std), (chain.mean, chain.std))
            )
            reached = chain.x[i, k + 1, tokens]
            steps.append((new.log_prob(reached) - old.log_prob(reached)).sum())
            bonus = bonus + new.entropy().sum() / (2 * T * A)
        elements = (T + count) * A if reduction == "mean" else 1
        for log_ratio in steps if reduction == "per_step" else [sum(steps) / elements]:
            gains = torch.stack([log_ratio.exp(), log_ratio.exp().clamp(0.9, 1.1)]) * batch.advantage[i]
            by_hand, clipped = (
                by_hand - gains.min() / (ratios * B),
                clipped + bool(abs(log_ratio.exp() - 1) > 0.1),
            )
        by_hand = by_hand - 0.01 * bonus / B
    assert 0 < clipped < ratios * B
    assert float(metrics["train/clip_fraction"]) == pytest.approx(clipped / (ratios * B))
    assert float(loss.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-9)
    parameters = [p for p in flow.parameters() if p.requires_grad]
    for one, other in zip(*(torch.autograd.grad(v, parameters) for v in (loss, by_hand)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_share_of_the_rows_has_noise_and_the_others_are_the_flow_itself():
    _, flow = make("flow_matching")
    observation, whole = sampled(flow)
    start = whole.x[:, 0]
    chain = flow.sample(observation, start, torch.Generator().manual_seed(1), noisy=0.5)
    alone = flow.flow(observation, start)
    torch.testing.assert_close(chain.chunk[: B // 2], alone[: B // 2])
    assert ((chain.chunk - alone)[B // 2 :].abs().amin((1, 2)) > 1e-6).all()
    noiseless = (chain.x[:, 1:] == chain.mean).flatten(1).all(1)
    assert noiseless.tolist() == [True] * (B // 2) + [False] * (B // 2)


def test_noise_at_one_step_and_the_loss_of_that_step():
    _, flow = make()
    observation, _ = sampled(flow, batch=24)
    start = torch.randn(24, T, A, dtype=torch.float64)
    chain = flow.sample(observation, start, torch.Generator().manual_seed(1), branches=True)
    noisy = (chain.x[:, 1:] != chain.mean).flatten(2).any(2)
    assert noisy.sum(1).eq(1).all()
    assert noisy.any(0).all()  # each of the K in some chain
    with torch.no_grad():
        next(flow.network.parameters()).mul_(0.7)
    batch = minibatch(observation, chain, executed=torch.arange(24) % T + 1)
    loss, metrics = TempFlow(clip_range=0.5).loss(flow, batch)
    mean, std = flow(observation, chain.x)
    by_hand, moved = 0.0, 0.0
    for i, k in enumerate(noisy.int().argmax(1).tolist()):
        tokens = slice(i % T + 1 if k == 3 else T)
        new, old = (
            torch.distributions.Normal(m[i, k, tokens], s[i, k, tokens])
            for m, s in ((mean, std), (chain.mean, chain.std))
        )
        reached, level = chain.x[i, k + 1, tokens], chain.std[i].mean((1, 2))
        ratio = (new.log_prob(reached) - old.log_prob(reached)).sum().exp()
        gain = torch.stack([ratio, ratio.clamp(0.5, 1.5)]) * batch.advantage[i]
        by_hand = by_hand - gain.min() * level[k] / level.mean() / 24
        moved += torch.distributions.kl_divergence(old, new).sum() / 24
    assert 0.1 < metrics["train/clip_fraction"] < 0.9
    assert float(loss.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-9)
    assert float(metrics["train/kl"]) == pytest.approx(float(moved.detach()), rel=1e-9)
    parameters = [p for p in flow.parameters() if p.requires_grad]
    for one, other in zip(*(torch.autograd.grad(v, parameters) for v in (loss, by_hand)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", ["shortcut", "flow_matching"])
def test_the_flow_without_noise_is_the_deployed_policy(objective):
    policy, flow = make(objective, dtype=torch.float32)
    start = torch.randn(B, T, A)
    observation = {"observation": torch.randn(B, T_O, 5)}
    chunk = policy.action_normalizer.denormalize(flow.flow(observation, start))
    assert torch.allclose(chunk, policy.act(observation, num_steps=4, noise=start), atol=1e-6)


def test_an_uneven_grid_has_each_steps_own_length_in_mean_and_noise():
    grid = {"name": "given", "times": [0.0, 0.5, 0.8, 1.0]}
    policy, flow = make("flow_matching", 3, grid=grid)
    observation, chain = sampled(flow)
    lengths = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    assert torch.allclose(flow.lengths.double(), lengths)
    context = flow.network.encode(observation)
    velocity = flow.network.velocity(chain.x[:, 1], chain.x.new_tensor([0.5]), chain.x.new_zeros(1), context)
    assert torch.allclose(chain.mean[:, 1], chain.x[:, 1] + 0.3 * velocity, atol=1e-6)
    even = flow.noise(observation, chain.x[:, :-1], torch.arange(3))
    assert torch.allclose(chain.std, even * (3 * lengths).sqrt()[:, None, None], atol=1e-6)
    mean, std = flow(observation, chain.x)
    assert torch.allclose(mean, chain.mean, atol=1e-9)
    assert torch.allclose(std, chain.std, atol=1e-9)
    uniform = make("flow_matching", 49)[1]
    assert torch.equal(uniform.spreads, torch.ones(49, dtype=torch.float64))
    deployed = FlowPolicy(dataclasses.replace(policy.config, tuned=flow.sampling))
    assert deployed.sampling.grid == grid
    with pytest.raises(ConfigError, match="tuned for"):
        deployed.checked(SamplerSpec(grid={"name": "shifted"}))


def test_a_default_solver_and_grid_are_for_sampling_without_noise():
    objective = {"name": "flow_matching", "default_solver": "ab3", "default_grid": {"name": "shifted"}}
    model = TransformerConfig(width=16, depth=1, num_heads=2)
    config = PolicyConfig(objective, model, {"observation": (5,)}, A, T_O, T, T)
    policy = FlowPolicy(config)
    assert str(policy.sampling) == "num_steps=4, solver=ab3, grid={'name': 'shifted', 'shift': 0.5}"
    assert NoisyFlow(policy, 4, NoiseConfig()).sampling.grid == {"name": "uniform"}
    before = FlowPolicy(dataclasses.replace(config, objective={"name": "flow_matching"}))
    assert before.sampling == SamplerSpec(num_steps=4, solver="euler")
    with pytest.raises(ConfigError, match="of at most 4 steps"):
        FlowPolicy(dataclasses.replace(config, objective={**objective, "default_solver": "ab12312"}))


def test_samples_are_not_clamped_and_the_last_mean_is():
    policy, flow = make(minimum=0.5, maximum=0.9, final_maximum=0.6)
    _, chain = sampled(flow, batch=200)
    bound = policy.config.action_clip
    assert chain.mean[:, -1].abs().max() <= bound
    assert (chain.mean[:, -1].abs() == bound).any()  # the clamp acts here
    assert chain.x[:, -1].abs().max() > bound
    shocks = (chain.x[:, 1:] - chain.mean) / chain.std
    assert abs(shocks.mean()) < 0.05
    assert abs(shocks.std() - 1) < 0.05


def test_the_density_of_a_two_step_chain_integrates_to_one_and_matches_samples():
    _, flow = make("flow_matching", 2, action_dim=1, horizon=1)
    observation = {"observation": torch.randn(1, T_O, 5, dtype=torch.float64)}
    start = torch.tensor([[[0.3]]], dtype=torch.float64)
    grid = torch.linspace(-4, 4, 161, dtype=torch.float64)
    cell = float(grid[1] - grid[0])
    first, second = torch.meshgrid(grid, grid, indexing="ij")
    x = torch.stack([torch.full_like(first, 0.3), first, second], -1).reshape(-1, 3, 1, 1)
    density = torch.empty(len(x), dtype=torch.float64)
    with torch.no_grad():
        for rows in torch.arange(len(x)).split(10_000):
            repeated = {"observation": observation["observation"].expand(len(rows), -1, -1)}
            density[rows] = log_prob(x[rows], *flow(repeated, x[rows])).sum((1, 2, 3)).exp()
    density = density.view(161, 161) * cell**2
    assert abs(density.sum() - 1) < 1e-4
    mean = (density.sum(0) * grid).sum()
    variance = (density.sum(0) * (grid - mean) ** 2).sum()
    count = 10_000
    many = {"observation": observation["observation"].expand(count, -1, -1)}
    generator = torch.Generator().manual_seed(2)
    last = flow.sample(many, start.expand(count, -1, -1), generator).x[:, -1, 0, 0]
    assert abs(last.mean() - mean) < 5 * (variance / count) ** 0.5
    assert abs(last.var() / variance - 1) < 5 * (3 / count) ** 0.5


def test_masked_actions_change_nothing_and_others_do():
    executed = torch.tensor([0, 1, 2, 3, 4, 4])
    mask = transition_mask(executed, 4, T)
    assert mask[:, -1, :, 0].sum(1).tolist() == executed.tolist()
    assert mask[1:, :-1].all()
    assert not mask[0].any()
    _, flow = make()
    observation, chain = sampled(flow)
    flow.network.output.bias.data += 0.05  # another policy: the ratios are not 1
    batch = minibatch(observation, chain, executed)
    loss, _ = PPO(clip_range=10.0).loss(flow, batch)
    changed = chain.x.clone()
    unexecuted = torch.arange(T) >= executed[:, None]
    changed[:, -1][unexecuted] += 3.0
    same, _ = PPO(clip_range=10.0).loss(flow, minibatch(observation, chain._replace(x=changed), executed))
    assert torch.allclose(loss, same, atol=1e-12)
    changed[:, -1][~unexecuted] += 0.1
    other, _ = PPO(clip_range=10.0).loss(flow, minibatch(observation, chain._replace(x=changed), executed))
    assert not torch.allclose(loss, other, atol=1e-6)


def test_the_policy_gradient_on_a_bandit_is_its_analytic_value():
    """One step, one dimension: d/dm E[r(x)] for x ~ N(m, s^2), r = x^2, is 2 m."""
    count = 400_000
    mean = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    std = torch.tensor(0.3, dtype=torch.float64)

    class Bandit(torch.nn.Module):
        clip = math.inf

        def forward(self, observation, x):
            return mean.expand(count, 1, 1, 1), std.expand(count, 1, 1, 1)

    generator = torch.Generator().manual_seed(0)
    sample = 0.4 + 0.3 * torch.randn(count, 1, 1, 1, generator=generator, dtype=torch.float64)
    x = torch.cat([torch.zeros_like(sample), sample], 1)
    reward = sample.flatten() ** 2
    old = torch.full((count, 1, 1, 1), 0.4, dtype=torch.float64)
    mask = transition_mask(torch.ones(count), 1, 1)
    batch = Minibatch({}, x, old, std.expand_as(old), mask, reward - reward.mean(), reward)
    loss, _ = PPO().loss(Bandit(), batch)
    loss.backward()
    assert -mean.grad.item() == pytest.approx(0.8, abs=0.02)


def test_kl_and_entropy_agree_with_torch_distributions():
    torch.manual_seed(0)
    mean, new_mean = torch.randn(2, 3, 4, 2, 5, dtype=torch.float64)
    std, new_std = torch.rand(2, 3, 4, 2, 5, dtype=torch.float64) + 0.1
    old, new = torch.distributions.Normal(mean, std), torch.distributions.Normal(new_mean, new_std)
    expected = torch.distributions.kl_divergence(old, new)
    assert torch.allclose(kl_divergence(mean, std, new_mean, new_std), expected)
    assert torch.allclose(entropy(std), old.entropy())


def test_noise_stays_within_bounds_that_fall_late():
    config = NoiseConfig(minimum=0.1, maximum=0.24, final_maximum=0.12, decay_from=0.35)
    assert config.bounds(0.0) == config.bounds(0.35) == (0.1, 0.24)
    assert config.bounds(1.0) == pytest.approx((0.1, 0.12))
    assert 0.12 < config.bounds(0.7)[1] < 0.24
    _, flow = make()
    torch.nn.init.normal_(flow.noise.output[-1].weight, std=50.0)
    _, chain = sampled(flow, batch=50)
    assert chain.std.min() >= 0.1 - 1e-7
    assert chain.std.max() <= 0.24 + 1e-7
    assert chain.std.max() > 0.23
    flow.noise.set_bounds(*config.bounds(1.0))
    _, chain = sampled(flow, batch=50)
    assert chain.std.max() <= 0.12 + 1e-7


def test_a_policy_without_a_flow_is_refused():
    for objective in ("regression", "mip"):
        with pytest.raises(ConfigError, match="no flow to integrate"):
            make(objective, 1)
    with pytest.raises(ConfigError, match="powers of two"):
        make("shortcut", 3)
