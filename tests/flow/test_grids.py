import itertools

import pytest

from flowpolicy.errors import ConfigError
from flowpolicy.flow import Shortcut
from flowpolicy.flow.grids import Shifted, Uniform, build_grid
from flowpolicy.flow.sampler_spec import SamplerSpec


@pytest.mark.parametrize("grid", [Uniform(), Shifted(), Shifted(0.1), Shifted(3.0)])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 100])
def test_steps_follow_one_another_from_noise_to_data(grid, num_steps):
    steps = grid.steps(num_steps)
    assert len(steps) == num_steps
    assert steps[0][0] == 0
    assert all(length > 0 for _, length in steps)
    assert sum(length for _, length in steps) == pytest.approx(1)
    for (t, h), (following, _) in itertools.pairwise(steps):
        assert t + h == pytest.approx(following)


def test_a_shift_below_one_takes_its_long_steps_at_the_noise():
    lengths = [length for _, length in Shifted(0.3).steps(6)]
    assert lengths == sorted(lengths, reverse=True)
    assert [t for t, _ in Shifted(1.0).steps(6)] == pytest.approx([t for t, _ in Uniform().steps(6)])


def test_settings_name_a_grid():
    assert build_grid({}) == build_grid({"name": "uniform"}) == Uniform()
    assert build_grid({"name": "shifted", "shift": 0.2}) == Shifted(0.2)
    for wrong, words in (({"name": "shiftd"}, "shifted"), ({"name": "shifted", "shift": 0.0}, "grid.shift")):
        with pytest.raises(ConfigError, match=words):
            SamplerSpec(grid=wrong)


def test_a_shortcut_policy_has_steps_of_one_size():
    with pytest.raises(ConfigError, match="steps of one size"):
        Shortcut().check(SamplerSpec(num_steps=4, solver="euler", grid={"name": "shifted"}))
