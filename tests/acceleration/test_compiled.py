"""What torch.compile is asked for, without the compiler: its front end shows how often it compiles."""

from functools import partial

import pytest
import torch
from toy_policy import random_observations, random_policy

from flowpolicy.acceleration import compiled
from flowpolicy.acceleration.sampler import build_sampler
from flowpolicy.errors import BackendError


def fail(graph, inputs, error):
    raise error


@pytest.fixture
def back_end(monkeypatch):
    """Compile by another back end than Inductor, anew."""
    original = torch.compile

    def choose(backend):
        monkeypatch.setattr(torch, "compile", partial(original, backend=backend))
        compiled._compiled.cache_clear()

    yield choose
    compiled._compiled.cache_clear()


def test_any_number_of_sizes_can_be_built_in_one_process(back_end):
    """With room for a single compilation a function, so that no function is ever compiled again."""
    back_end("eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        for policy, sizes in ((random_policy(depth=1), (1, 2, 3)), (random_policy("shortcut"), (2,))):
            for rows in sizes:
                sampler = build_sampler(policy, batch_size=rows, num_steps=2, backend="compile")
                observations, noise = random_observations(rows), torch.randn(rows, 4, 2)
                wanted = policy.act(observations, num_steps=2, noise=noise)
                torch.testing.assert_close(sampler(observations, noise), wanted)


def test_samplers_of_the_same_sizes_share_what_was_compiled(back_end):
    graphs = []
    back_end(lambda graph, inputs: graphs.append(graph) or graph.forward)
    build_sampler(random_policy(), batch_size=2, num_steps=4, backend="compile")
    assert len(graphs) == 4  # three kinds of block, and the output
    build_sampler(random_policy(seed=1), batch_size=2, num_steps=8, backend="compile")
    assert len(graphs) == 4


def no_compiler():
    from torch._inductor.exc import InvalidCxxCompiler

    return InvalidCxxCompiler()


@pytest.mark.parametrize(
    ("error", "is_compiler"),
    [
        (no_compiler(), True),
        (MemoryError("out of memory"), False),
        (ZeroDivisionError("division of seven by zero"), False),
    ],
)
def test_the_error_names_its_own_cause(back_end, error, is_compiler):
    back_end(partial(fail, error=error))
    with pytest.raises(BackendError) as raised:
        build_sampler(random_policy(), batch_size=1, num_steps=2, backend="compile")
    sentence = str(raised.value)
    assert ("needs a C++ compiler" in sentence) == is_compiler
    assert "\n" not in sentence
    assert sentence.endswith(".")
    if not is_compiler:
        assert str(error) in sentence
