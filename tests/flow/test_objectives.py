"""What holds for every objective, and the two regressions by hand."""

import pytest
import torch
from exact_fields import Field, sample

from flowpolicy.data.sampling import Batch
from flowpolicy.errors import ConfigError
from flowpolicy.flow import MIP, OBJECTIVES, Draws, Regression, build_objective
from flowpolicy.flow.objective import masked_mean
from flowpolicy.flow.sampler_spec import SamplerSpec

ALL = sorted(OBJECTIVES)


def random_batch(count=16, horizon=3, dim=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(count, horizon, generator=generator) < 0.7
    action = torch.randn(count, horizon, dim, generator=generator)
    return Batch({"observation": torch.zeros(count, 1, 1)}, action, mask)


def part(batch, rows):
    return Batch({k: v[rows] for k, v in batch.observation.items()}, batch.action[rows], batch.mask[rows])


def test_masked_mean_of_a_batch_is_the_mean_over_its_parts():
    generator = torch.Generator().manual_seed(0)
    error, mask = torch.rand(12, 5, 3, generator=generator), torch.rand(12, 5, generator=generator) < 0.4
    parts = [masked_mean(error[rows], mask[rows]) for rows in (slice(0, 4), slice(4, 8), slice(8, 12))]
    assert torch.allclose(torch.stack(parts).mean(), masked_mean(error, mask))
    assert torch.allclose(masked_mean(error, mask), (error * mask[..., None]).sum() / error.numel())
    assert masked_mean(error, torch.zeros_like(mask)) == 0


@pytest.mark.parametrize("name", ALL)
def test_loss_of_a_batch_is_the_mean_over_equal_parts(name):
    objective = build_objective({"name": name})
    batch = random_batch(24)
    draws = objective.draw((24, 3, 2), torch.Generator().manual_seed(1), "cpu")
    field = Field(lambda x, t, d: 0.3 * x * (1 + d) + t)
    whole, _ = objective.loss(field, batch, draws)
    unit = objective.row_multiple
    cuts = [slice(i, i + 2 * unit) for i in range(0, 24, 2 * unit)]
    parts = [objective.loss(field, part(batch, rows), draws[rows])[0] for rows in cuts]
    assert len(parts) > 1
    assert torch.allclose(torch.stack(parts).mean(), whole, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_padded_actions_do_not_enter_the_loss_or_its_gradient(name):
    objective = build_objective({"name": name})
    batch = random_batch()
    draws = objective.draw((16, 3, 2), torch.Generator().manual_seed(1), "cpu")
    other = batch.action.clone()
    other[~batch.mask] = 77.0
    results = []
    for action in (batch.action, other):
        weight = torch.tensor([0.3, 0.5], requires_grad=True)
        # token by token: what a token is trained on can only come from itself
        field = Field(lambda x, t, d, w=weight: w * x + t)
        loss, _ = objective.loss(field, Batch(batch.observation, action, batch.mask), draws)
        loss.backward()
        results.append((loss.detach(), weight.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("name", ALL)
def test_draws_repeat_with_the_generator_and_cut_by_rows(name):
    objective = build_objective({"name": name})
    first, second = (objective.draw((8, 3, 2), torch.Generator().manual_seed(5), "cpu") for _ in range(2))
    assert torch.equal(first.noise, second.noise)
    assert torch.equal(first.t, second.t)
    assert torch.equal(first.d, second.d)
    assert first.noise.shape == (8, 3, 2)
    assert first.d.shape == (8,)
    assert torch.equal(first[4:6].noise, first.noise[4:6])
    assert torch.equal(first[4:6].t, first.t[4:6])


def one_row(action):
    return Batch({"observation": torch.zeros(1, 1, 1)}, torch.tensor([[[action]]]), torch.ones(1, 1).bool())


def test_regression_by_hand():
    field = Field(lambda x, t, d: x + t + 3.0)
    draws = Regression().draw((1, 1, 1), None, "cpu")
    assert Regression().loss(field, one_row(1.0), draws)[0] == (3 - 1) ** 2
    chunk = sample(Regression(), field, torch.full((2, 1, 1), 9.0), 1, "euler")
    assert chunk.tolist() == [[[3.0]], [[3.0]]]  # noise plays no part
    assert Regression().nfe(SamplerSpec(num_steps=1, solver="euler")) == len(field.calls) - 1 == 1


def test_mip_by_hand():
    """f(x, t) = x / 2 + t + 1, s = 0.8: f(0, 0) = 1, then f(0.8, 0.8) = 2.2."""
    field = Field(lambda x, t, d: x / 2 + t + 1)
    objective = MIP(second_time=0.8)
    chunk = sample(objective, field, torch.full((1, 1, 1), 9.0), 2, "euler")
    assert float(chunk) == pytest.approx(2.2)
    assert objective.nfe(SamplerSpec(num_steps=2, solver="euler")) == len(field.calls)
    # x_1 = 2, x_0 = -1: x_s = 1.4, f(x_s, s) = 2.5; loss (1 - 2)^2 + (2.5 - 2)^2
    draws = Draws(torch.full((1, 1, 1), -1.0), torch.tensor([0.8]), torch.zeros(1))
    loss, metrics = objective.loss(field, one_row(2.0), draws)
    assert float(loss) == pytest.approx(1.25)
    assert float(metrics["loss/first_step"]) == pytest.approx(1.0)
    assert torch.equal(objective.draw((3, 1, 1), None, "cpu").t, torch.full((3,), 0.8))


@pytest.mark.parametrize(("objective", "steps"), [(Regression(), 2), (MIP(), 1), (MIP(), 4), (MIP(), 0)])
def test_other_numbers_of_steps_are_refused(objective, steps):
    with pytest.raises(ConfigError, match=rf"num_steps(=| is ){steps}"):
        objective.check(SamplerSpec(num_steps=steps, solver="euler"))


def test_other_solvers_of_regressions_are_refused():
    for objective, steps in ((Regression(), 1), (MIP(), 2)):
        with pytest.raises(ConfigError, match="heun"):
            objective.check(SamplerSpec(num_steps=steps, solver="heun"))
