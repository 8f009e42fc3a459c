import dataclasses

import pytest
import torch
from exact_fields import Field, GaussianFlow, sample

from flowpolicy.data.sampling import Batch
from flowpolicy.errors import ConfigError
from flowpolicy.flow import Draws, Shortcut
from flowpolicy.flow.path import interpolate
from flowpolicy.flow.sampler_spec import SamplerSpec

FLOW = GaussianFlow(mean=-0.4, std=0.3)
OBJECTIVE = Shortcut(max_steps=16)


def exact(x, t, d):
    """The average velocity over [t, t + d]; d = 0 stands for the finest step."""
    return FLOW.average_velocity(x, t, d.double().clamp(min=1 / OBJECTIVE.max_steps))


def drawn(count=4096, objective=OBJECTIVE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch = FLOW.batch(count, generator, (2, 3))
    return batch, objective.draw(tuple(batch.action.shape), generator, "cpu")


def test_levels_and_step_sizes():
    assert OBJECTIVE.levels == 5
    sizes = [OBJECTIVE.step_size(1 / steps) for steps in (1, 2, 4, 8, 16, 32, 64)]
    assert sizes == [1, 1 / 2, 1 / 4, 1 / 8, 0, 0, 0]


def test_coarse_rows_lie_on_their_own_grid():
    _, draws = drawn(40_000)
    coarse = draws.d > 0
    assert torch.equal(coarse, torch.arange(len(coarse)) % 4 == 0)
    for level in range(1, OBJECTIVE.levels):
        size = 2**level / OBJECTIVE.max_steps
        assert set(draws.t[draws.d == size].tolist()) == {k * size for k in range(round(1 / size))}
        share = float((draws.d[coarse] == size).float().mean())
        assert abs(share - 1 / 4) < 0.02  # log2 M = 4 coarse levels, equally often
    fine = draws.t[~coarse]
    assert len(fine.unique()) > 0.95 * len(fine)


def test_bootstrap_target_of_exact_velocities_is_the_exact_coarse_velocity():
    batch, draws = drawn()
    rows = draws.d > 0
    x = interpolate(draws.noise, batch.action, draws.t)[rows].double()
    t, d = draws.t[rows].double(), draws.d[rows].double()
    target = OBJECTIVE.bootstrap_target(Field(exact), batch.observation, x, t, d)
    assert torch.allclose(target, exact(x, t.view(-1, 1, 1), d.view(-1, 1, 1)), atol=1e-10)


def test_self_consistency_of_exact_velocities_is_zero_and_of_others_is_not():
    batch, draws = drawn()
    _, metrics = OBJECTIVE.loss(Field(exact), batch, draws)
    assert metrics["loss/self_consistency"] < 1e-9
    # the instantaneous velocity at every d is what flow matching has: it is not self-consistent
    _, other = OBJECTIVE.loss(Field(lambda x, t, d: FLOW.velocity(x, t)), batch, draws)
    assert other["loss/self_consistency"] > 1e-3


def test_every_number_of_steps_gives_the_same_sample_where_velocities_are_exact():
    noise = torch.randn(500, 2, 3, dtype=torch.float64)
    field = Field(exact)
    wanted = FLOW.mean + FLOW.std * noise
    for steps in (1, 2, 4, 8, 16):
        assert torch.allclose(sample(OBJECTIVE, field, noise, steps, "euler"), wanted, atol=1e-10)


def test_loss_is_the_mean_of_both_targets():
    batch, draws = drawn(64)
    loss, metrics = OBJECTIVE.loss(Field(exact), batch, draws)
    parts = metrics["loss/flow_matching"], metrics["loss/self_consistency"]
    assert torch.allclose(loss, 0.75 * parts[0] + 0.25 * parts[1])
    fine = draws.d == 0
    x = interpolate(draws.noise, batch.action, draws.t)[fine]
    error = exact(x, draws.t[fine].view(-1, 1, 1), torch.zeros(1, 1, 1)) - (batch.action - draws.noise)[fine]
    assert torch.allclose(parts[0].double(), error.square().mean(), rtol=1e-4)


def scaled(parameter):
    """v = parameter (1 + level), whose bootstrap target at level j is parameter * j."""

    def velocity(x, t, d):
        level = torch.log2((d * OBJECTIVE.max_steps).clamp(min=1))
        return parameter * (1 + level) * torch.ones_like(x)

    return Field(velocity)


def one_coarse_row(level=2):
    batch = Batch({"observation": torch.zeros(1, 1, 1)}, torch.zeros(1, 1, 1), torch.ones(1, 1).bool())
    return batch, Draws(torch.zeros(1, 1, 1), torch.zeros(1), torch.tensor([2**level / OBJECTIVE.max_steps]))


def test_targets_come_from_the_average_where_asked_for():
    batch, draws = one_coarse_row()
    live, average = scaled(torch.tensor(1.0)), scaled(torch.tensor(10.0))
    loss, _ = OBJECTIVE.loss(live, batch, draws, average)
    assert loss == (1 * 3 - 10 * 2) ** 2
    online = dataclasses.replace(OBJECTIVE, bootstrap_from_ema=False)
    assert online.loss(live, batch, draws, average)[0] == (1 * 3 - 1 * 2) ** 2
    assert OBJECTIVE.loss(live, batch, draws)[0] == 1  # without an average there is only the network


def test_no_gradient_flows_through_a_target():
    batch, draws = one_coarse_row()
    parameter, average = torch.tensor(1.0, requires_grad=True), torch.tensor(10.0, requires_grad=True)
    loss, _ = OBJECTIVE.loss(scaled(parameter), batch, draws, scaled(average))
    loss.backward()
    assert parameter.grad == 2 * (3 - 20) * 3
    assert average.grad is None
    parameter.grad = None
    OBJECTIVE.loss(scaled(parameter), batch, draws)[0].backward()
    assert parameter.grad == 2 * (3 - 2) * 3  # through the target as well it would be 2


def test_the_second_half_of_a_bootstrap_starts_where_the_first_ends():
    batch, draws = one_coarse_row(level=3)
    field = Field(lambda x, t, d: 1 + x)
    target = OBJECTIVE.bootstrap_target(field, batch.observation, draws.noise, draws.t, draws.d)
    half = 1 / 4
    assert [float(t) for t, _ in field.calls] == [0.0, half]
    assert [float(d) for _, d in field.calls] == [half, half]
    assert float(target) == (1 + (1 + half * 1)) / 2


@pytest.mark.parametrize("steps", [0, -1, 3, 5, 6, 12, 100])
def test_other_than_powers_of_two_are_refused(steps):
    with pytest.raises(ConfigError, match="powers of two" if steps > 0 else "at least 1"):
        OBJECTIVE.check(SamplerSpec(num_steps=steps, solver="euler"))


def test_second_order_solvers_need_the_instantaneous_velocity():
    OBJECTIVE.check(SamplerSpec(num_steps=16, solver="heun"))
    with pytest.raises(ConfigError, match="num_steps >= 16"):
        OBJECTIVE.check(SamplerSpec(num_steps=8, solver="heun"))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": 12},
        {"max_steps": 1},
        {"bootstrap_fraction": 0.0},
        {"bootstrap_fraction": 0.7},
        {"bootstrap_fraction": 1.0},
        {"default_num_steps": 3},
    ],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ConfigError):
        Shortcut(**settings)
