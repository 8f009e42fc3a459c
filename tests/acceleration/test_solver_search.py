"""A searched solver has the least error found, belongs to its policy, and is taken wherever a name is."""

import json
from pathlib import Path

import pytest
import torch
from toy_policy import random_observations, random_policy

from flowpolicy.acceleration.caching.schedule import Schedule, ScheduleKey, full_schedule
from flowpolicy.acceleration.choosing.candidates import candidates_of
from flowpolicy.acceleration.sampler import accelerate, build_sampler
from flowpolicy.acceleration.solver_search import SearchConfig, search_sampling
from flowpolicy.errors import CheckpointError, ConfigError
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.policy.searched import SearchedSampling

CONFIG = SearchConfig(checkpoint="", nfe=2, iterations=8)


@pytest.fixture(scope="module")
def search(policy):
    return search_sampling(policy, random_observations(16), random_observations(8, seed=1), CONFIG)


@pytest.fixture(scope="module")
def file(search, tmp_path_factory):
    return str(search.found.save(tmp_path_factory.mktemp("searched") / "solver.json"))


def test_it_is_no_worse_than_any_hand_made_one_of_its_nfe(search, policy):
    least = search.errors["searched"][0]
    assert all(least <= here for here, _ in search.errors.values())
    assert {name.partition(",")[0] for name in search.errors} == {"searched", "num_steps=2", "num_steps=1"}
    sampling = search.found.sampling
    assert policy.objective.nfe(sampling) == 2
    assert len(sampling.grid["times"]) == sampling.steps + 1


def test_a_file_stands_for_what_it_holds(search, file, policy, observations, noise, exports):
    sampling = search.found.sampling
    assert SearchedSampling.load(file) == search.found
    expected = policy.act(observations, sampler=sampling, noise=noise)
    assert torch.equal(policy.act(observations, solver=file, noise=noise), expected)
    assert policy.nfe(solver=file) == 2
    for backend in ("eager", "onnx"):
        sampler = build_sampler(policy, batch_size=5, solver=file, backend=backend, exports=exports)
        torch.testing.assert_close(sampler(observations, noise), expected, rtol=0, atol=1e-3)
        assert sampler.sampling.content() == {**sampling.content(), "backend": backend}
    assert SamplerSpec(**json.loads(json.dumps(sampling.content()))) == sampling
    assert sampling in [item.sampling for item in candidates_of(policy, searched=[SamplerSpec(solver=file)])]


def test_a_cache_schedule_is_for_its_solver_and_grid(file, policy, observations, noise, tmp_path):
    schedule = full_schedule(ScheduleKey.of(policy, SamplerSpec(solver=file)))
    again = Schedule.load(schedule.save(tmp_path / "schedule.json"))
    expected = policy.act(observations, solver=file, noise=noise)
    assert torch.equal(accelerate(policy, again, batch_size=5)(observations, noise), expected)
    with pytest.raises(ConfigError, match="made for another"):
        build_sampler(policy, num_steps=again.key.num_steps, schedule=again)


def test_it_is_refused_elsewhere(search, file, policy, observations):
    with pytest.raises(ConfigError, match="searched for another checkpoint"):
        random_policy(seed=3).act(observations, solver=file)
    with pytest.raises(CheckpointError, match=r"No searched solver at nowhere\.json"):
        policy.act(observations, solver="nowhere.json")
    for wrong in ({"num_steps": 9}, {"grid": {"name": "shifted"}}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is .*or left out"):
            policy.checked(SamplerSpec(solver=file, **wrong))
    with pytest.raises(ConfigError, match="steps of one size"):
        search_sampling(random_policy("shortcut"), random_observations(4), random_observations(4), CONFIG)
    with pytest.raises(ConfigError, match="no flow"):
        search_sampling(random_policy("regression"), random_observations(4), random_observations(4), CONFIG)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("fingerprint", None, "fingerprint"),
        ("sampling", {"num_steps": 4, "solver": "ab3"}, "num_steps, solver and grid"),
        ("solver", "other.json", "num_steps, solver and grid"),
        ("solver", "ab4", "solver is 'ab4'"),
        ("grid", {"name": "given", "times": [0, 2]}, "grid.times"),
        ("backend", "onnx", "num_steps, solver and grid"),
    ],
)
def test_a_damaged_file_is_one_sentence(file, tmp_path, key, value, words):
    content = json.loads(Path(file).read_text())
    place = content if key in content else content["sampling"]
    place[key] = value
    damaged = tmp_path / "damaged.json"
    damaged.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=words):
        SearchedSampling.load(damaged)
