import pytest


@pytest.fixture(scope="module")
def sampler():
    from served_policy import make_policy

    from flowpolicy.acceleration.sampler import build_sampler

    return build_sampler(make_policy(), num_steps=4)


@pytest.fixture(scope="module")
def server(sampler):
    from served_policy import TOKEN, serving

    with serving(sampler, token=TOKEN, max_batch=8) as server:
        yield server


@pytest.fixture
def client(server):
    from served_policy import TOKEN

    from flowpolicy.serving.client import PolicyClient

    with PolicyClient(*server.address, TOKEN) as client:
        yield client
