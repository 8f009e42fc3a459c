import pytest
import torch
from toy_policy import random_observations, random_policy


@pytest.fixture(scope="session")
def policy():
    return random_policy()


@pytest.fixture(scope="session")
def exports():
    """What ONNX samplers of ``policy`` for ``observations`` have exported so far."""
    return {}


@pytest.fixture(scope="session")
def observations():
    return random_observations(5)


@pytest.fixture(scope="session")
def noise():
    return torch.randn(5, 4, 2, generator=torch.Generator().manual_seed(9))
