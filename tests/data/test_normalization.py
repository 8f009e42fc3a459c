import pytest
import torch

from flowpolicy.data.normalization import MODES, Normalizer
from flowpolicy.errors import ConfigError, DataError


def data(rows=2000, seed=0):
    """Three moving dimensions of very different size and place, and a constant one."""
    generator = torch.Generator().manual_seed(seed)
    moving = torch.rand(rows, 3, generator=generator) * torch.tensor([1e-3, 1.0, 1e4])
    return torch.cat([moving + torch.tensor([0.0, -5.0, 3e4]), torch.full((rows, 1), 7.25)], dim=1)


@pytest.mark.parametrize("mode", MODES)
def test_denormalize_undoes_normalize_within_the_data(mode):
    values = data()
    normalizer = Normalizer.fit(values, mode, clip=1e6)
    back = normalizer.denormalize(normalizer.normalize(values))
    spread = values.amax(0) - values.amin(0)
    assert ((back - values).abs() <= 1e-5 * spread + 1e-6 * values.abs()).all()


def test_minmax_maps_the_range_to_plus_minus_one():
    normalized = Normalizer.fit(data()).normalize(data())[:, :3]
    assert torch.allclose(normalized.amin(0), -torch.ones(3), atol=1e-3)
    assert torch.allclose(normalized.amax(0), torch.ones(3), atol=1e-3)


def test_gaussian_maps_to_mean_zero_and_deviation_one():
    normalized = Normalizer.fit(data(), "gaussian").normalize(data())[:, :3]
    assert torch.allclose(normalized.mean(0), torch.zeros(3), atol=1e-3)
    assert torch.allclose(normalized.std(0, correction=0), torch.ones(3), atol=1e-3)


def test_quantiles_are_deaf_to_outliers_and_minmax_is_not():
    values = data()[:, 1:2].clone()
    clean = Normalizer.fit(values, "quantile").scale
    values[0] = 1e6
    assert torch.allclose(Normalizer.fit(values, "quantile").scale, clean, rtol=0.01)
    assert Normalizer.fit(values, "minmax").scale > 1e5
    share = (Normalizer.fit(values, "quantile").normalize(values).abs() > 1).float().mean()
    assert 0.015 < share < 0.025


def test_none_changes_nothing():
    values = torch.randn(50, 3)
    assert torch.equal(Normalizer.fit(values, "none", clip=100.0).normalize(values), values)


@pytest.mark.parametrize("mode", ["minmax", "gaussian", "quantile"])
@pytest.mark.parametrize("constant", [0.0, 7.25, -3e5])
def test_a_constant_dimension_maps_to_zero_and_back_to_its_constant(mode, constant):
    values = torch.cat([torch.randn(100, 1), torch.full((100, 1), constant)], dim=1)
    normalizer = Normalizer.fit(values, mode)
    assert (normalizer.normalize(values)[:, 1] == 0).all()
    assert (normalizer.normalize(values + 1e3)[:, 1] == 0).all()  # a range of zero is no division by 1e-6
    anything = normalizer.denormalize(torch.randn(10, 2))
    assert (anything[:, 1] == constant).all()
    assert torch.isfinite(anything).all()


def test_float_noise_on_a_large_constant_counts_as_constant():
    values = 1e5 + 1e-2 * torch.rand(100, 1)
    assert (Normalizer.fit(values).normalize(values) == 0).all()


def test_a_dimension_that_moves_only_beyond_its_quantiles_is_not_lost():
    values = torch.zeros(1000, 1)
    values[3] = 1.0  # a gripper that closes once
    normalized = Normalizer.fit(values, "quantile").normalize(values)
    assert normalized[0] == -1
    assert normalized[3] == 1


def test_values_outside_the_range_are_extrapolated_and_then_held():
    normalizer = Normalizer.fit(torch.tensor([[-2.0], [2.0]]), clip=3.0)
    outside = torch.tensor([[4.0], [100.0], [-1e30]])
    assert normalizer.normalize(outside).flatten().tolist() == [2.0, 3.0, -3.0]


def test_shapes_of_more_than_one_axis():
    values = torch.randn(40, 9, 2)
    normalizer = Normalizer.fit(values)
    assert normalizer.center.shape == (9, 2)
    assert normalizer.normalize(values.view(10, 4, 9, 2)).shape == (10, 4, 9, 2)


@pytest.mark.parametrize("mode", ["minmax", "quantile", "gaussian"])
def test_the_statistics_travel_in_the_state_dict(mode):
    fitted = Normalizer.fit(data(), mode)
    other = Normalizer((4,), mode)
    other.load_state_dict(fitted.state_dict())
    other.refresh()
    assert torch.equal(other.normalize(data()), fitted.normalize(data()))


def test_one_row_is_all_constant():
    normalizer = Normalizer.fit(torch.tensor([[3.0, 4.0]]), "gaussian")
    assert normalizer.denormalize(torch.ones(1, 2)).tolist() == [[3.0, 4.0]]


@pytest.mark.parametrize("values", [torch.zeros(0, 3), torch.tensor([[1.0], [float("nan")]])])
def test_data_that_give_no_statistics_are_refused(values):
    with pytest.raises(DataError):
        Normalizer.fit(values)


def test_unknown_modes_are_refused_with_the_choices():
    with pytest.raises(ConfigError, match="minmax"):
        Normalizer((3,), "min-max")
