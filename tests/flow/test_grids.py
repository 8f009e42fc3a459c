import itertools

import pytest

from flowpolicy.errors import ConfigError
from flowpolicy.flow import FlowMatching, Shortcut
from flowpolicy.flow.grids import Given, Shifted, Sigmoid, Uniform, build_grid
from flowpolicy.flow.sampler_spec import SamplerSpec


@pytest.mark.parametrize("grid", [Uniform(), Shifted(), Shifted(0.1), Shifted(3.0), Sigmoid()])
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


def test_a_sigmoid_takes_its_short_steps_at_both_ends():
    lengths = [length for _, length in Sigmoid(4.0).steps(5)]
    assert lengths == pytest.approx(lengths[::-1])
    assert lengths[0] < lengths[1] < lengths[2]


def test_given_times_are_the_grid():
    steps = Given((0.0, 0.5, 0.75, 1.0)).steps(3)
    assert steps == [(0.0, 0.5), (0.5, 0.25), (0.75, 0.25)]
    with pytest.raises(ConfigError, match=r"grid.times .*of 4 steps"):
        FlowMatching().check(
            SamplerSpec(num_steps=4, solver="euler", grid={"name": "given", "times": [0, 1]})
        )


def test_settings_name_a_grid():
    assert build_grid({}) == build_grid({"name": "uniform"}) == Uniform()
    assert build_grid({"name": "shifted", "shift": 0.2}) == Shifted(0.2)
    assert build_grid({"name": "given", "times": [0, 0.2, 1]}) == Given((0.0, 0.2, 1.0))
    given = [{"name": "given", "times": times} for times in ([], [0], [0, 0.5], [0.1, 1], [0, 0.6, 0.5, 1])]
    for wrong, words in (
        ({"name": "shiftd"}, "shifted"), ({"name": "shifted", "shift": 0.0}, "grid.shift"),
        ({"name": "sigmoid", "steepness": -1.0}, "grid.steepness"), ({"name": "given"}, "grid.times"),
        *((grid, "ascending from 0 to 1") for grid in given),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            SamplerSpec(grid=wrong)


def test_a_shortcut_policy_has_steps_of_one_size():
    with pytest.raises(ConfigError, match="steps of one size"):
        Shortcut().check(SamplerSpec(num_steps=4, solver="euler", grid={"name": "shifted"}))
