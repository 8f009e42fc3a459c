"""Plans: what is measured bounds what was asked, the front and the choice, and whom a plan is refused to."""

from __future__ import annotations

import dataclasses
import fractions
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from flowpolicy import FlowPolicy
from flowpolicy.acceleration.choosing.candidates import (
    Candidate,
    candidates_of,
    reference_of,
    searched_schedules,
    with_errors,
)
from flowpolicy.acceleration.choosing.choose import (
    _left_out,
    _nearest_miss,
    delays_of,
    front_of,
    schedule_file,
    unbeaten,
)
from flowpolicy.acceleration.choosing.config import PlanConfig
from flowpolicy.acceleration.choosing.measuring import Measured, bounding_rank, measure, upper_bound
from flowpolicy.acceleration.choosing.plan import DeploymentPlan, MeasuredSampler, hardware
from flowpolicy.acceleration.deployed import only
from flowpolicy.errors import CheckpointError, ConfigError
from flowpolicy.evaluation.task import Task
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.policy.fingerprint import fingerprint


@pytest.fixture(scope="module")
def policies(repo_root):
    folder = repo_root / "benchmarks" / "checkpoints"
    names = ("hopper-shortcut-seed0", "hopper-flow_matching-seed0", "hopper-reinflow-seed0")
    return {name.split("-")[1]: FlowPolicy.load(folder / name) for name in names}


def observations(policy, rows=8):
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randn(rows, policy.spec.obs_horizon, *shape, generator=generator)
        for key, shape in policy.spec.observation_shapes.items()
    }


def test_the_bound_holds_a_quantile_of_calls_with_confidence():
    """Of many samples of 1000 calls the bound is above the true quantile in at least 95%."""
    rng = np.random.default_rng(0)
    true = math.exp(2.326)  # the 0.99 quantile of a log-normal
    above = [upper_bound(np.split(rng.lognormal(size=1000), 1), 0.99) >= true for _ in range(400)]
    assert np.mean(above) >= 0.93
    slow = [np.full(250, 1.0), np.full(250, 1.0), np.full(250, 5.0), np.full(250, 1.0)]
    assert upper_bound(slow, 0.9) == 5.0  # one bad bout is enough


@pytest.mark.parametrize(("count", "quantile"), [(300, 0.99), (2000, 0.99), (59, 0.95), (1000, 0.5)])
def test_the_rank_is_the_least_that_is_sure(count, quantile):
    """Counted with whole numbers: at least so many calls below the quantile come with at most 5%."""

    def at_least(rank):
        share = fractions.Fraction(str(quantile))
        return sum(
            math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(rank, count + 1)
        )

    rank = bounding_rank(count, quantile)
    assert at_least(rank) <= 0.05 < at_least(rank - 1)
    assert bounding_rank(10, 0.99) == 10  # too few to be sure of: the slowest one


def test_only_valid_samplings_are_candidates(policies):
    shortcut = candidates_of(policies["shortcut"])
    assert {c.sampling.num_steps for c in shortcut} <= {1, 2, 4, 8, 16, 32, 64}
    assert {c.sampling.solver for c in shortcut} == {"euler"} or all(
        c.sampling.num_steps >= 32 for c in shortcut if c.sampling.solver != "euler"
    )
    flow = candidates_of(policies["flow_matching"])
    assert {c.sampling.solver for c in flow} == {"euler", "midpoint", "heun", "taylor", "ab2", "ab3"}
    assert {c.sampling.grid_object.name for c in flow} == {"uniform", "shifted"}
    assert any(c.schedule is not None for c in flow)
    assert all(a.work <= b.work for a, b in itertools.pairwise(flow))
    (tuned,) = candidates_of(policies["reinflow"])
    assert (tuned.sampling.num_steps, tuned.nfe) == (policies["reinflow"].config.tuned.num_steps,) * 2


def test_errors_are_to_the_best_sampling_with_the_same_noise(policies):
    policy = policies["flow_matching"]
    assert reference_of(policy) == SamplerSpec(num_steps=100, solver="euler")
    asked = [
        c for c in candidates_of(policy) if c.schedule is None and c.sampling.num_steps in (1, 4, 16, 100)
    ]
    found = {
        (c.sampling.num_steps, c.sampling.solver): c.error
        for c in with_errors(policy, asked, observations(policy), seed=0)
    }
    assert found[100, "euler"] == 0
    assert found[1, "euler"] > found[4, "euler"] > found[16, "euler"] > 0
    assert found[4, "midpoint"] < found[4, "euler"]


def test_the_error_of_other_observations_is_within_its_bound(policies):
    """The bound is of the mean square over observations: most fresh sets stay below it."""
    policy = policies["shortcut"]
    asked = [c for c in candidates_of(policy) if c.schedule is None and c.sampling.num_steps == 1][:1]
    many = observations(policy, 320)
    parts = [{key: value[i : i + 32] for key, value in many.items()} for i in range(0, 320, 32)]
    found = [next(with_errors(policy, asked, part, seed)) for seed, part in enumerate(parts)]
    true = math.sqrt(np.mean([item.error**2 for item in found]))
    assert np.mean([item.error_bound >= true for item in found]) >= 0.8
    assert all(item.error < item.error_bound < item.largest_error for item in found)


def test_searched_schedules_do_the_work_of_uniform_ones_with_less_error(policies):
    policy = policies["shortcut"]
    making = observations(policy, 8)
    found = searched_schedules(policy, making, iterations=6, seed=0)
    uniform = [c for c in candidates_of(policy) if c.sampling.num_steps == 32 and c.schedule is not None]
    assert [s.share for s in found] == [c.share for c in uniform]
    for schedule in found:
        assert schedule.calibration["rms_error"] <= schedule.calibration["rms_error_of_starts"][0]


def test_what_cannot_be_the_best_is_not_built():
    def item(steps, nfe, error, bound):
        return Candidate(SamplerSpec(num_steps=steps, solver="euler"), None, nfe, error, bound)

    small, good, worse, equal, vague = (
        item(1, 1, 0.3, 0.31), item(4, 4, 0.1, 0.12), item(5, 5, 0.2, 0.21), item(6, 4, 0.1, 0.12),
        item(3, 3, 0.05, 0.9),
    )  # fmt: skip
    kept, beaten = unbeaten([small, good, worse, equal, vague], max_action_error=0.5)
    assert kept == [small, good, equal, vague]  # vague is too inexact to beat anything
    assert [(row.candidate, row.verdict) for row in beaten] == [(worse, "beaten by K = 4 euler")]
    (line,) = _left_out(beaten)
    assert "K = 5 euler (beaten by K = 4 euler)" in line


def test_a_call_becomes_a_delay_in_whole_control_steps():
    task = Task("toy", "Toy-v0", control_hz=100.0)
    item = Measured(good_candidate(), "onnx", [np.array([0.5, 3.0, 3.1, 10.0, 10.1, 25.0])])
    assert delays_of(item, task).tolist() == [0, 0, 1, 1, 2, 3]


def good_candidate():
    return Candidate(SamplerSpec(num_steps=4, solver="euler"), None, 4, 0.1, 0.1)


def row(error, bound, work=1, verdict="in time"):
    candidate = Candidate(SamplerSpec(num_steps=work, solver="euler"), None, work, error, error)
    return Measured(candidate, "onnx", [np.full(10, bound)], bound, verdict)


def test_the_front_is_what_nothing_beats_in_both():
    rows = [row(0.5, 1), row(0.1, 4), row(0.2, 3), row(0.2, 5), row(0.05, 9), row(0.3, 3.5)]
    assert [(r.candidate.error, r.bound) for r in front_of(rows)] == [(0.05, 9), (0.1, 4), (0.2, 3), (0.5, 1)]
    assert [r.bound for r in front_of(rows, 2)] == [9, 1]
    assert len(front_of([row(1 / b, b) for b in range(1, 9)], 6)) == 6


def test_nothing_in_time_names_the_nearest_miss():
    config = PlanConfig("x", 2.0, calls=1000, margin=0.0)
    rows = [row(0.05, 7.0, verdict="too slow"), row(0.08, 3.5, work=2, verdict="too slow")]
    assert "K = 2 euler in onnx, which needs period_ms=3.5" in _nearest_miss(rows, config)
    inexact = [row(0.4, float("nan"), verdict="too inexact")]
    assert "the least is 0.4000" in _nearest_miss(inexact, config)


def test_measuring_prunes_by_error_and_by_time(policies):
    policy = policies["flow_matching"]
    config = PlanConfig(
        "x", 400.0, quantile=0.5, calls=12, bouts=2, pause_s=0, observations=4, backends=("eager",),
        max_action_error=0.2,
    )  # fmt: skip
    plain = [c for c in candidates_of(policy) if c.schedule is None and c.sampling.num_steps in (1, 4, 16)]
    some = [c for c in plain if c.sampling.solver in ("euler", "heun")]
    judged = list(with_errors(policy, some, observations(policy, 4), seed=0))
    rows = measure(policy, judged, observations(policy, 4), config)
    for item in rows:
        assert (item.verdict == "too inexact") == (item.candidate.error_bound > 0.2)
        if item.verdict == "in time":
            assert len(item.all_calls()) == 12
            assert np.median(item.all_calls()) <= item.bound <= 400
        else:
            assert item.verdict in ("too inexact", "too slow") or item.verdict.startswith("slower than K")
    hasty = measure(policy, judged, observations(policy, 4), dataclasses.replace(config, period_ms=0.01))
    assert {item.verdict for item in hasty} <= {"too inexact", "too slow", "too slow (not built)"}


@pytest.fixture
def plan(policies):
    sampling = SamplerSpec(num_steps=4, solver="euler", backend="onnx")
    sampler = MeasuredSampler(sampling, 1.0, 4, {"p50": 1.0, "bound": 2.0}, 0.05)
    fast = SamplerSpec(num_steps=1, solver="euler", backend="onnx", schedule="schedule.json")
    return DeploymentPlan(
        fingerprint(policies["shortcut"]), hardware(1), 4.0, 0.99, 0.1, sampler,
        dataclasses.replace(sampler, sampling=fast), "cpu", 1, 4,
    )  # fmt: skip


def test_a_plan_survives_its_file_and_says_what_to_build(plan, policies, tmp_path):
    loaded = DeploymentPlan.load(plan.save(tmp_path / "plan.json"))
    assert dataclasses.replace(loaded, folder="") == plan
    loaded.check(policies["shortcut"])
    settings = loaded.deployed("somewhere")
    assert (settings.checkpoint, settings.num_steps, settings.backend) == ("somewhere", 4, "onnx")
    assert Path(loaded.deployed_fast("x").schedule) == tmp_path / "schedule.json"


def test_a_plan_keeps_all_of_a_samplers_description(plan, tmp_path):
    sampling = SamplerSpec(
        num_steps=3, solver="heun", grid={"name": "shifted", "shift": 0.3}, backend="onnx", dtype="int8"
    )
    plan = dataclasses.replace(plan, sampler=dataclasses.replace(plan.sampler, sampling=sampling))
    loaded = DeploymentPlan.load(plan.save(tmp_path / "plan.json"))
    assert loaded.sampler.sampling == only(loaded.deployed("somewhere"), SamplerSpec) == sampling


def test_a_plan_of_format_1_has_its_sampling_among_the_figures(plan, tmp_path):
    path = plan.save(tmp_path / "plan.json")
    content = json.loads(path.read_text())
    for name in ("sampler", "fast"):
        sampling = content[name].pop("sampling")
        content[name] |= {key: sampling[key] for key in ("num_steps", "solver", "backend", "schedule")}
    path.write_text(json.dumps({**content, "format_version": 1}))
    assert dataclasses.replace(DeploymentPlan.load(path), folder="") == plan


def test_schedules_of_equal_work_have_files_of_their_own(policies):
    flow = policies["flow_matching"]
    (one,) = [
        c
        for c in candidates_of(flow)
        if c.schedule is not None and c.sampling.num_steps == 20 and c.work == 2
    ]
    other = dataclasses.replace(one, schedule=dataclasses.replace(one.schedule, method="searched"))
    assert schedule_file(Measured(one, "onnx")) != schedule_file(Measured(other, "onnx"))


def test_a_plan_for_another_checkpoint_or_machine_is_refused(plan, policies):
    with pytest.raises(CheckpointError, match="another checkpoint"):
        plan.check(policies["flow_matching"])
    elsewhere = dataclasses.replace(plan, hardware={**plan.hardware, "cpu": "Z80"})
    with pytest.raises(CheckpointError, match=r"another machine \(cpu: Z80 there"):
        elsewhere.check(policies["shortcut"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(format_version=9), "not a plan of formats 1 to 2"),
        (lambda c: c.pop("sampler"), "plan.sampler is missing"),
        (lambda c: c.update(periodms=3), "did you mean 'plan.period_ms'"),
    ],
)
def test_a_broken_plan_is_one_sentence(plan, tmp_path, change, words):
    path = plan.save(tmp_path / "plan.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=words):
        DeploymentPlan.load(path)


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_file_that_is_no_plan_is_one_sentence(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"the plan is damaged; make one with"):
        DeploymentPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"period_ms": 0.0}, "period_ms"),
        ({"quantile": 1.0}, "quantile"),
        ({"quantile": 0.999, "calls": 1000}, "at least 3000"),
        ({"max_action_error": -1.0}, "max_action_error"),
        ({"backends": ("onx",)}, "did you mean 'onnx'"),
        ({"strategy": "rtc"}, "switch or ensemble"),
        ({"pause_s": -1.0}, "pause_s"),
    ],
)
def test_settings_that_promise_nothing_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        PlanConfig(**{"checkpoint": "x", "period_ms": 5.0, **settings})
