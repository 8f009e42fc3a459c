"""Policies of hand_dapg: read from files as theirs are, without what else a file may ask for."""

import os
import pickle
import sys
from collections import OrderedDict
from itertools import pairwise
from types import ModuleType

import gymnasium as gym
import numpy as np
import pytest
import torch

from flowpolicy.errors import ConfigError, DataError
from flowpolicy_envs.dapg_experts import DapgExpert


class Spaces:
    """What an expert looks at of an environment."""

    def __init__(self, observed, actions):
        self.observation_space = gym.spaces.Dict({"observation": gym.spaces.Box(-1, 1, (observed,))})
        self.action_space = gym.spaces.Box(-1, 1, (actions,))


@pytest.fixture
def policy(monkeypatch):
    """A function that makes a policy of theirs: classes with their names, PyTorch's own layers."""
    kinds = []
    for module, name in (("mjrl.utils.fc_network", "FCNetwork"), ("mjrl.policies.gaussian_mlp", "MLP")):
        kinds.append(type(name, (), {"__module__": module}))
        for package in ("mjrl", module.rpartition(".")[0], module):
            monkeypatch.setitem(sys.modules, package, ModuleType(package))
        setattr(sys.modules[module], name, kinds[-1])

    def make(sizes, **altered):
        torch.manual_seed(0)
        whole, network = kinds[1](), kinds[0]()
        layers = torch.nn.ModuleList(torch.nn.Linear(*pair) for pair in pairwise(sizes))
        network._modules = OrderedDict(fc_layers=layers)
        for end, size in (("in", sizes[0]), ("out", sizes[-1])):
            vars(network).update({f"{end}_shift": torch.rand(size), f"{end}_scale": torch.rand(size)})
        vars(network).update(altered)
        whole.model, whole.log_std = network, np.zeros(sizes[-1])
        return whole

    return make


def test_the_mean_action_is_the_networks(policy, tmp_path):
    made = policy((5, 8, 6, 3))
    (tmp_path / "policy.pickle").write_bytes(pickle.dumps(made))
    expert = DapgExpert(str(tmp_path / "policy.pickle"))
    assert expert.reset(Spaces(5, 3), np.random.default_rng(0)) == "dapg"
    observation = torch.linspace(-1, 1, 5)
    net, layers = made.model, made.model._modules["fc_layers"]
    hidden = (observation - net.in_shift) / (net.in_scale + 1e-8)
    for layer in layers[:-1]:
        hidden = layer(hidden).tanh()
    wanted = layers[-1](hidden) * net.out_scale + net.out_shift
    found = expert.act(None, {"observation": observation.numpy()})
    np.testing.assert_allclose(found, wanted.detach(), rtol=1e-5)
    with pytest.raises(DataError, match="5 observed numbers and 3 actions, and the task has 46 and 26"):
        expert.reset(Spaces(46, 26), np.random.default_rng(0))


class Runs:
    """Unpickles to a call."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_other_files_are_refused_and_run_nothing(policy, tmp_path):
    marker, file = tmp_path / "ran", tmp_path / "policy.pickle"
    altered = {
        "code": policy((5, 3), extra=Runs(marker), in_shift=None),
        "infinite": policy((5, 3), in_scale=torch.full((5,), torch.inf)),
        "order": policy((5, 3), in_scale=torch.rand(5, 2)[:, 0]),
        "sizes": policy((5, 3), out_shift=torch.zeros(4)),
        "numbers": [1.0, 2.0],
    }
    for content in (*map(pickle.dumps, altered.values()), b"", b"no pickle", pickle.dumps(bytes(2**21))):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"is no policy of hand_dapg"):
            DapgExpert(str(file))
    file.write_bytes(pickle.dumps(policy((5, 3), extra=Runs(marker))))
    DapgExpert(str(file))
    assert not marker.exists()
    with pytest.raises(DataError, match="There is no file"):
        DapgExpert(str(tmp_path / "other.pickle"))
    with pytest.raises(ConfigError, match=r"env\.scripted\.settings\.policy=FILE"):
        DapgExpert().reset(Spaces(5, 3), np.random.default_rng(0))
