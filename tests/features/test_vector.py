"""Vectors, and what is taken for one."""

import numpy as np
import pytest
from kinds import check_kind, policy_of

from flowpolicy.errors import ConfigError, FlowPolicyError
from flowpolicy.features import Vector


def test_a_vector_is_a_whole_observation(tmp_path):
    check_kind(Vector((3,)), np.random.default_rng(0).normal(size=(9, 3)), tmp_path)


@pytest.mark.parametrize("shape", [(2, 4, 4), (4, 4), (96, 96, 3)])
def test_what_is_declared_a_vector_has_one_axis(shape):
    with pytest.raises(ConfigError, match=r"'eef' has shape .* data\.kinds=\{eef: KIND\}"):
        policy_of({"eef": Vector(shape)})


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_no_action_is_computed_from_what_is_not_finite(value):
    with pytest.raises(FlowPolicyError, match="'x' holds NaN or infinity"):
        policy_of({"x": Vector((1,))}).act({"x": np.full((1, 2, 1), value)})
