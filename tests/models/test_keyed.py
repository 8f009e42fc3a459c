import pytest
import torch
from torch import nn

from flowpolicy.features.keyed import KeyedModules

ORDINARY = ["observation", "agent_pos", "eye in hand", "a%b", "observation/state", "Größe", "0"]
AWKWARD = ["a.b", "a%2Eb", "%a", "%a%2Eb", ".", "..", "type", "values", "train", "keys", "forward", "_names"]
AWKWARD += ["items", "training", "_modules", "state_dict", "to", "pop", "%", "__class__", "__dict__"]


def test_any_key_finds_its_module_and_every_name_is_its_own():
    keys = ORDINARY + AWKWARD
    modules = KeyedModules({key: nn.Linear(1, 1) for key in keys})
    assert list(modules) == list(modules.keys()) == keys
    assert [module for _, module in modules.items()] == list(modules.values())
    assert len({id(modules[key]) for key in keys}) == len(modules) == len(keys)
    assert all(key in modules for key in keys)
    assert "something else" not in modules
    assert len(list(modules.parameters())) == 2 * len(keys)
    for name, _ in modules.named_modules():
        modules.get_submodule(name)


def test_statistics_travel_to_the_modules_of_the_same_keys():
    keys = ORDINARY + AWKWARD
    first = KeyedModules({key: nn.Linear(1, 1) for key in keys})
    second = KeyedModules({key: nn.Linear(1, 1) for key in reversed(keys)})
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(first[key].weight, second[key].weight) for key in keys)


@pytest.mark.parametrize("key", ORDINARY)
def test_an_ordinary_key_is_the_modules_name_as_in_older_checkpoints(key):
    module = nn.Linear(1, 1)
    assert KeyedModules({key: module}).state_dict().keys() == nn.ModuleDict({key: module}).state_dict().keys()
