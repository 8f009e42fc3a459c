"""Which task is to be done."""

import numpy as np
import pytest
from kinds import check_kind, policy_of

from flowpolicy.errors import ConfigError
from flowpolicy.features import Task


def test_a_task_is_a_whole_observation(tmp_path):
    check_kind(Task((3,)), np.eye(3)[np.arange(9) % 3], tmp_path)


def test_a_task_may_have_any_name():
    policy = policy_of({"which": Task((3,)), "task": Task((2,))})
    assert policy.network.encoder["task"].embed.in_features == 5


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_a_task_is_one_hot(shape):
    with pytest.raises(ConfigError, match="one-hot vector of the task"):
        policy_of({"task": Task(shape)})
