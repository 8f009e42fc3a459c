import numpy as np
import pytest
import torch

from flowpolicy.data.normalization import MODES, Normalizer
from flowpolicy.errors import ConfigError, DataError


def data(rows=2000, seed=0):
    """Three moving dimensions of very different size and place, and a constant one."""
    generator = torch.Generator().manual_seed(seed)
    moving = torch.rand(rows, 3, generator=generator) * torch.tensor([1e-3, 1.0, 1e4])
    return torch.cat([moving + torch.tensor([0.0, -5.0, 3e4]), torch.full((rows, 1), 7.25)], dim=1)


def round_trip(normalizer, values):
    return normalizer.denormalize(normalizer.normalize(values))


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


@pytest.mark.parametrize("mode", ["minmax", "gaussian", "quantile"])
def test_constant_is_a_matter_of_the_values_own_size(mode):
    tiny = 4e-7 * torch.linspace(-1, 1, 101)[:, None]
    back = round_trip(Normalizer.fit(tiny, mode), tiny)
    assert torch.allclose(back, tiny, rtol=1e-4, atol=1e-11)


def test_float64_is_centred_before_it_is_rounded():
    meters = 5e6 + torch.linspace(-1, 1, 201, dtype=torch.float64)[:, None]  # UTM: float32 has .5 m there
    back = round_trip(Normalizer.fit(meters), meters)
    assert (back - meters).abs().max() <= 1e-4 * 2


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
    assert torch.equal(other.normalize(data()), fitted.normalize(data()))


def test_a_scale_that_changes_in_place_is_seen():
    normalizer = Normalizer.fit(torch.tensor([[-1.0], [1.0]]))
    frozen = normalizer.frozen()
    normalizer.scale.copy_(torch.tensor([2.0]))
    normalizer.center.copy_(torch.tensor([1.0]))
    value = torch.tensor([[3.0]])
    assert normalizer.normalize(value) == 1.0
    assert frozen(value) == 3.0


def random_actions(seed, rows=1200):
    """Dimensions of every kind that demonstrations have: smooth, switched, rarely switched, constant, heavy
    tails, a tiny range with rare large values; each at its own place and of its own size."""
    rng = np.random.default_rng(seed)
    rare = rng.random(rows) < rng.uniform(0.001, 0.02)
    rare[rng.integers(rows)] = True
    columns = [
        rng.uniform(-1, 1, rows),
        np.sign(rng.normal(size=rows)),
        np.where(rare, -1.0, 1.0),
        np.where(rare, 1.57, 1e-5 * rng.random(rows)),
        np.full(rows, rng.normal()),
        rng.standard_t(2, rows),
    ]
    sizes = 10.0 ** rng.integers(-8, 6, len(columns))
    places = np.where(rng.random(len(columns)) < 0.5, 0.0, sizes * rng.uniform(-100, 100, len(columns)))
    return torch.from_numpy(np.stack(columns, 1) * sizes + places).float()


@pytest.mark.parametrize("clip", [1.0, 1.5, 5.0])
@pytest.mark.parametrize("mode", ["minmax", "gaussian", "quantile"])
def test_every_action_that_was_fitted_comes_back(mode, clip):
    for seed in range(20):
        actions = random_actions(seed)
        normalizer = Normalizer.fit(actions, mode, clip, keep_all=True)
        size = actions.abs().amax(0)
        error = (round_trip(normalizer, actions) - actions).abs()
        assert (error <= 1e-4 * (actions.amax(0) - actions.amin(0)) + 1e-6 * size).all()
        assert not normalizer.lost(actions, clip).any()


def test_keeping_all_actions_changes_only_the_dimensions_that_would_lose_some():
    actions = random_actions(0)
    plain = Normalizer.fit(actions, "gaussian")
    whole = Normalizer.fit(actions, "gaussian", keep_all=True)
    untouched = plain.scale == whole.scale
    lost = plain.lost(actions, 5.0).any(0)
    assert torch.equal(untouched, ~lost)
    assert lost.any()
    assert untouched.any()
    assert torch.equal(plain.center[untouched], whole.center[untouched])


def test_at_a_clip_of_one_every_map_is_that_of_the_full_range():
    actions = random_actions(1)
    whole, full = Normalizer.fit(actions, "quantile", 1.0, keep_all=True), Normalizer.fit(actions, "minmax")
    assert torch.allclose(whole.center, full.center)
    assert torch.allclose(whole.scale, full.scale)


def test_what_a_narrow_bound_cuts_off_is_counted():
    actions = torch.linspace(-2, 2, 101)[:, None]
    lost = Normalizer.fit(actions).lost(actions, 0.5)
    assert torch.equal(lost, actions.abs() > 1.0 + 4e-4)
    share = float((actions.abs() > 1.5).float().mean())
    assert Normalizer((1,), "none", clip=1.5).lost_share(actions, 1.5) == share
    assert Normalizer((), "none", clip=1.5).lost_share(actions[:, 0], 1.5) == share


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


def test_entries_with_a_range_of_their_own_stay_as_they_are():
    entries = np.array([True, False])
    normalizer = Normalizer.fit(torch.randn(50, 2), entries=entries)
    values = torch.tensor([[1e3, 17.0], [-1e3, -17.0]])
    copy = Normalizer((2,), entries=entries)  # as a checkpoint is loaded
    copy.load_state_dict(normalizer.state_dict())
    for normalize in (normalizer.normalize, normalizer.frozen(), copy.normalize):
        assert normalize(values).tolist() == [[5.0, 17.0], [-5.0, -17.0]]
    assert normalizer.lost(values).tolist() == [[True, False], [True, False]]
