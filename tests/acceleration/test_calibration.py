"""Similarities against a direct computation; schedules made from them; bad calibration sets."""

import json

import numpy as np
import pytest
import torch
from toy_policy import random_observations, random_policy

from flowpolicy.acceleration.caching.calibration import CalibrationConfig, calibrate
from flowpolicy.acceleration.caching.schedule import Schedule, ScheduleKey, full_schedule
from flowpolicy.acceleration.caching.scheduling import uniform
from flowpolicy.acceleration.caching.search import ActionError, search
from flowpolicy.acceleration.caching.similarity import measure_similarity
from flowpolicy.acceleration.engine import BlockEngine
from flowpolicy.acceleration.sampler import build_sampler
from flowpolicy.errors import ConfigError, DataError, FlowPolicyError
from flowpolicy.flow.sampler_spec import SamplerSpec

CONFIG = CalibrationConfig(
    "none", num_steps=12, updates=4, bubbles=2, observations=64, noise_seeds=1, test_observations=8,
    search_iterations=40, search_observations=8,
)  # fmt: skip


def test_similarity_is_the_mean_over_samples(policy):
    sampling = policy.checked(SamplerSpec(num_steps=3))
    found = measure_similarity(policy, random_observations(64), sampling, noise_seeds=2, seed=5, rows=24)
    key = ScheduleKey.of(policy, sampling)
    engine = BlockEngine(policy, sampling, 128, full_schedule(key))
    outputs = {}
    engine.observe = lambda evaluation, block, output: outputs.update(
        {(evaluation, block): output.flatten(1)}
    )
    twice = {name: values.repeat(2, 1, 1) for name, values in random_observations(64).items()}
    engine(twice, policy.noise(128, None, torch.Generator().manual_seed(5)))
    for block in range(len(key.blocks)):
        distances = []
        for i in range(3):
            for j in range(3):
                cosine = torch.cosine_similarity(outputs[i, block], outputs[j, block], dim=1)
                assert found.cosine[block, i, j] == pytest.approx(float(cosine.mean()), abs=1e-5)
                assert found.spread[block, i, j] == pytest.approx(float(cosine.std(correction=0)), abs=2e-3)
                if i < j:
                    distances.append(float((outputs[i, block] - outputs[j, block]).abs().mean()))
        assert found.error[block] == pytest.approx(np.mean(distances), rel=1e-4)


@pytest.fixture(scope="module")
def calibrated(policy):
    return calibrate(policy, random_observations(64, seed=1), random_observations(8, seed=2), CONFIG)


def test_schedules_of_every_method_and_their_errors(policy, calibrated):
    shares = {name: schedule.share for name, schedule in calibrated.schedules.items()}
    assert set(shares) == {"uniform", "acs", "acs+bua", "consecutive", "searched"}
    assert all(share == pytest.approx(4 / 12) for name, share in shares.items() if name != "acs+bua")
    assert shares["acs+bua"] >= 4 / 12
    judging, noise = random_observations(8, seed=2), torch.Generator().manual_seed(CONFIG.seed + 1)
    noise = policy.noise(8, None, noise)
    normalize = policy.action_normalizer.normalize
    plain = normalize(policy.act(judging, num_steps=12, noise=noise))
    for schedule in calibrated.schedules.values():
        cached = normalize(
            build_sampler(policy, batch_size=8, num_steps=12, schedule=schedule)(judging, noise)
        )
        difference = cached - plain
        assert schedule.calibration["rms_error"] == pytest.approx(
            float(difference.square().mean().sqrt()), rel=1e-3
        )
        assert schedule.calibration["max_error"] == pytest.approx(float(difference.abs().max()), rel=1e-3)
    errors = {name: schedule.calibration["rms_error"] for name, schedule in calibrated.schedules.items()}
    assert len(set(errors.values())) > 2
    assert errors[calibrated.chosen] == min(
        error for name, error in errors.items() if shares[name] <= shares["acs+bua"]
    )
    fewer = normalize(policy.act(judging, num_steps=4, noise=noise)) - plain
    assert calibrated.fewer_steps == pytest.approx(float(fewer.square().mean().sqrt()), rel=1e-3)


def test_search_does_not_lose_to_what_it_starts_from(policy):
    key = ScheduleKey.of(policy, SamplerSpec(num_steps=12))
    start = Schedule(key, (uniform(12, 4),) * 6, "uniform")
    error = ActionError(policy, random_observations(8, seed=1), start)
    before = error(start.updates)
    found = search(error, [start], 24, iterations=150)
    assert sum(map(len, found.updates)) <= 24
    assert error(found.updates) == pytest.approx(found.calibration["rms_error"])
    assert found.calibration["rms_error"] < 0.98 * before
    richer = Schedule(key, (tuple(range(12)),) * 6, "full")
    thinned = search(error, [richer], 24, iterations=0)
    assert sum(map(len, thinned.updates)) == 24
    with pytest.raises(ConfigError, match="budget"):
        search(error, [start], 5)


def test_everything_is_written(calibrated, tmp_path):
    files = calibrated.write(tmp_path)
    assert all(file.stat().st_size > 0 for file in files)
    assert Schedule.load(tmp_path / "schedule.json").method == calibrated.chosen
    matrices = np.load(tmp_path / "similarity.npz")
    assert matrices["cosine"].shape == (6, 12, 12)
    assert json.dumps(calibrated.metrics())
    assert calibrated.table().count("\n") == 7


def test_bad_calibration_sets_are_refused(policy):
    with pytest.raises(DataError, match="at least 64"):
        measure_similarity(policy, random_observations(63), SamplerSpec(num_steps=4))
    broken = random_observations(64)
    broken["goal"][3] = float("nan")
    with pytest.raises(FlowPolicyError, match="NaN"):
        measure_similarity(policy, broken, SamplerSpec(num_steps=4))
    with pytest.raises(ConfigError, match="nothing to reuse"):
        calibrate(random_policy("shortcut"), broken, broken, CalibrationConfig("none", num_steps=1))
    with pytest.raises(ConfigError, match="at most the 4 evaluations"):
        calibrate(policy, broken, broken, CalibrationConfig("none", num_steps=4))
