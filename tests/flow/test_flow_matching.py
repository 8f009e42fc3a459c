import math

import pytest
import torch
from exact_fields import Field, GaussianFlow, energy_distance, sample

from flowpolicy.data.sampling import Batch
from flowpolicy.errors import ConfigError
from flowpolicy.features import features_of
from flowpolicy.flow import FlowMatching, build_objective
from flowpolicy.flow.grids import Uniform
from flowpolicy.flow.network import field
from flowpolicy.flow.path import interpolate, velocity_target
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.flow.solvers import SOLVERS, integrate
from flowpolicy.models.config import TransformerConfig
from flowpolicy.models.transformer import VelocityTransformer
from flowpolicy.spec import PolicySpec

FLOW = GaussianFlow(mean=0.7, std=0.4)
COUNT = 200_000


def test_path_is_the_straight_line_and_its_derivative():
    noise, data = torch.randn(2, 3, 4, 2, dtype=torch.float64)
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    x = interpolate(noise, data, t)
    assert torch.equal(x[0], noise[0])
    assert torch.equal(x[2], data[2])
    step = 1e-6
    slope = (interpolate(noise, data, t + step) - x) / step
    assert torch.allclose(slope, velocity_target(noise, data), atol=1e-8)


def per_sample_losses(field, batch, draws):
    """The loss of every row by itself, for its standard error."""
    x = interpolate(draws.noise, batch.action, draws.t)
    error = field.velocity(x, draws.t, draws.d, None) - (batch.action - draws.noise)
    return error.square().flatten()


def test_loss_of_the_optimal_field_is_its_analytic_minimum():
    generator = torch.Generator().manual_seed(0)
    batch = FLOW.batch(COUNT, generator)
    objective = FlowMatching()
    draws = objective.draw(tuple(batch.action.shape), generator, "cpu")
    field = Field(lambda x, t, d: FLOW.velocity(x, t))
    loss, metrics = objective.loss(field, batch, draws)
    standard_error = float(per_sample_losses(field, batch, draws).std()) / math.sqrt(COUNT)
    assert standard_error < 0.005
    assert abs(float(loss) - FLOW.least_loss()) < 4 * standard_error
    assert metrics["loss/flow_matching"] == loss
    # any other field costs its mean squared distance more
    worse, _ = objective.loss(Field(lambda x, t, d: FLOW.velocity(x, t) + 0.3), batch, draws)
    assert abs(float(worse - loss) - 0.09) < 8 * standard_error


def test_samples_of_the_exact_field_match_the_gaussian():
    count = 100_000
    noise = torch.randn(count, 1, 1, generator=torch.Generator().manual_seed(1))

    def deviation(samples):
        """In units of the standard errors of a mean and of a standard deviation of this many samples."""
        mean = abs(float(samples.mean()) - FLOW.mean) / (FLOW.std / math.sqrt(count))
        std = abs(float(samples.std()) - FLOW.std) / (FLOW.std / math.sqrt(2 * count))
        return max(mean, std)

    field = Field(lambda x, t, d: FLOW.velocity(x, t))
    assert deviation(sample(FlowMatching(), field, noise, 64, "heun")) < 4
    assert deviation(sample(FlowMatching(), field, noise, 1024, "euler")) < 4
    reversed_time = Field(lambda x, t, d: FLOW.velocity(x, 1 - t))
    assert deviation(sample(FlowMatching(), reversed_time, noise, 64, "heun")) > 20
    assert deviation(noise) > 100


def two_moons(count, generator):
    """Points ``(count, 1, 2)`` on two interleaved half circles of radius 0.6, blurred by 0.04."""
    angle = math.pi * torch.rand(count, generator=generator)
    upper = torch.rand(count, generator=generator) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
    points = 0.6 * torch.stack([x, y], dim=-1)[:, None]
    return points + 0.04 * torch.randn(points.shape, generator=generator)


def trained_on_moons(objective, steps=250, rows=256):
    torch.manual_seed(0)
    spec = PolicySpec(features_of({"observation": (1,)}), 1, 1, 1, action_dim=2)
    config = TransformerConfig(width=32, depth=1, num_heads=2, tokens_per_step=1)
    network = VelocityTransformer(config, spec, objective.levels)
    optimizer = torch.optim.Adam(network.parameters(), lr=8e-3)
    generator = torch.Generator().manual_seed(1)
    blind, mask = {"observation": torch.zeros(rows, 1, 1)}, torch.ones(rows, 1, dtype=torch.bool)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 8e-3 * (1 - step / steps)
        batch = Batch(blind, two_moons(rows, generator), mask)
        loss, _ = objective.loss(network, batch, objective.draw((rows, 1, 2), generator, "cpu"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "num_steps"), [({"name": "flow_matching"}, 32), ({"name": "shortcut", "max_steps": 8}, 8)]
)
def test_a_trained_network_samples_two_moons(settings, num_steps):
    objective = build_objective(settings)
    network = trained_on_moons(objective)
    generator = torch.Generator().manual_seed(2)
    data, noise = two_moons(2000, generator), torch.randn(2000, 1, 2, generator=generator)
    with torch.no_grad():
        context = network.encode({"observation": torch.zeros(2000, 1, 1)})
        velocity = field(network, context, objective.step_size)
        samples = objective.sample(velocity, noise, SamplerSpec(num_steps=num_steps, solver="euler"))

        def reversed_time(x, t, h):
            return network.velocity(x, x.new_full((1,), 1 - t), torch.zeros(1), context)

        wrong = integrate(reversed_time, noise, num_steps, SOLVERS["euler"], Uniform())
    chance = abs(energy_distance(two_moons(2000, generator)[:, 0], data[:, 0]))
    bound = 0.01
    assert chance < bound / 4
    assert energy_distance(samples[:, 0], data[:, 0]) < bound
    assert energy_distance(noise[:, 0], data[:, 0]) > 10 * bound  # an untrained network returns its noise
    assert energy_distance(wrong[:, 0], data[:, 0]) > 2.5 * bound


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="shortcut"):
        build_objective({"name": "shortcuts"})
    with pytest.raises(ConfigError, match="default_num_steps"):
        build_objective({"name": "flow_matching", "default_num_step": 2})
    with pytest.raises(ConfigError, match="at least 1"):
        build_objective({"name": "flow_matching", "default_num_steps": 0})
