import math

import pytest
import torch

from flowpolicy.errors import ConfigError
from flowpolicy.flow.time_sampling import build_time_sampler

COUNT = 100_000


def normal_cdf(z):
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


CDFS = {
    "uniform": ({}, lambda t: t),
    "logit_normal": ({"mean": -0.5, "std": 0.8}, lambda t: normal_cdf((torch.logit(t) + 0.5) / 0.8)),
    "beta": ({"alpha": 1.5, "limit": 0.9}, lambda t: 1 - (1 - t / 0.9).clamp(min=0) ** 1.5),
    "u_shaped": (
        {"a": 4.0},
        lambda t: (torch.sinh(4 * (t - 0.5)) + math.sinh(2)) / (2 * math.sinh(2)),
    ),
}


@pytest.mark.parametrize("name", CDFS)
def test_times_follow_the_stated_distribution(name):
    settings, cdf = CDFS[name]
    sampler = build_time_sampler({"name": name, **settings})
    t = sampler(COUNT, torch.Generator().manual_seed(1), "cpu")
    assert t.shape == (COUNT,)
    assert t.min() >= 0
    assert t.max() <= 1
    expected = cdf(t.double().sort().values)
    steps = torch.arange(COUNT + 1, dtype=torch.float64) / COUNT
    distance = torch.maximum((expected - steps[:-1]).abs(), (expected - steps[1:]).abs()).max()
    assert distance < 1.95 / math.sqrt(COUNT)  # Kolmogorov-Smirnov, 0.1% level


def test_beta_prefers_noise_and_u_shaped_is_symmetric():
    generator = torch.Generator().manual_seed(2)
    beta = build_time_sampler("beta")(COUNT, generator, "cpu")
    assert abs(float(beta.mean()) - 0.999 * (1 - 1.5 / 2.5)) < 0.005  # u ~ Beta(1.5, 1) has mean 1.5 / 2.5
    u_shaped = build_time_sampler("u_shaped")(COUNT, generator, "cpu")
    assert abs(float(u_shaped.mean()) - 0.5) < 0.005
    assert float(((u_shaped - 0.5).abs() > 0.25).float().mean()) > 0.6


def test_times_repeat_with_the_generator():
    for name in CDFS:
        sampler = build_time_sampler(name)
        first, second = (sampler(8, torch.Generator().manual_seed(3), "cpu") for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("uniformm", "uniform"),
        ({"name": "beta", "alhpa": 1.0}, "alpha"),
        ({"name": "logit_normal", "std": 0.0}, "positive"),
        ({"name": "beta", "limit": 1.5}, r"\(0, 1\]"),
        ({"name": "u_shaped", "a": -1.0}, "positive"),
        ({}, "uniform"),
    ],
)
def test_bad_settings_are_refused_with_the_remedy(settings, words):
    with pytest.raises(ConfigError, match=words):
        build_time_sampler(settings)
