"""Samplers against the policy they are built from, and against a plain cached loop."""

import dataclasses

import numpy as np
import pytest
import torch
from toy_policy import random_observations, random_policy

from flowpolicy.acceleration.caching.schedule import Schedule, ScheduleKey, full_schedule
from flowpolicy.acceleration.caching.scheduling import uniform
from flowpolicy.acceleration.sampler import accelerate, build_sampler
from flowpolicy.errors import ConfigError, FlowPolicyError
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.models.blocks import Modulation

BACKENDS = ["eager", "compile", "onnx"]


def normalized(policy, chunk):
    return policy.action_normalizer.normalize(chunk)


def some_schedule(policy, num_steps, seed=0, solver="euler"):
    key = ScheduleKey.of(policy, SamplerSpec(num_steps=num_steps, solver=solver))
    rng = np.random.default_rng(seed)
    rest = [np.flatnonzero(rng.random(key.num_evaluations - 1) < 0.4) + 1 for _ in key.blocks]
    return Schedule(key, tuple((0, *map(int, steps)) for steps in rest), "random")


@pytest.mark.parametrize(("objective", "num_steps", "solver"), [
    ("flow_matching", 1, "euler"), ("flow_matching", 7, "euler"), ("flow_matching", 3, "heun"),
    ("flow_matching", 3, "midpoint"), ("flow_matching", 4, "ab3"), ("flow_matching", 2, "taylor"),
    ("shortcut", 1, "euler"), ("shortcut", 4, "euler"), ("shortcut", 32, "heun"),
])  # fmt: skip
def test_recomputing_everything_is_the_plain_policy_to_the_last_bit(
    objective, num_steps, solver, observations, noise
):
    policy = random_policy(objective)
    expected = policy.act(observations, num_steps=num_steps, solver=solver, noise=noise)
    sampler = build_sampler(policy, batch_size=5, num_steps=num_steps, solver=solver)
    assert torch.equal(sampler(observations, noise), expected)
    full = full_schedule(ScheduleKey.of(policy, SamplerSpec(num_steps=num_steps, solver=solver)))
    assert torch.equal(accelerate(policy, full, batch_size=5)(observations, noise), expected)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_caching_is_a_loop_that_adds_the_last_output_of_each_block(solver, policy, observations, noise):
    schedule = some_schedule(policy, 9, solver=solver)
    network, batch = policy.network, policy.normalize_observations(observations)
    context, outputs, at = network.encode(batch), {}, [0]

    @torch.no_grad()
    def velocity(x, t):
        blocks, last = network.modulations(torch.full((1,), t), torch.zeros(1))
        h = network.embed(x)
        each = Modulation.of_blocks(blocks, 3)
        for index, block in enumerate(network.blocks()):
            if at[0] in schedule.updates[index]:
                outputs[index] = block.module(h, each[index], context[block.layer])
            h = h + outputs[index]
        at[0] += 1
        return network.readout(h, last)

    x, h = noise, 1 / 9
    for k in range(9):
        first = velocity(x, k / 9)
        x = x + h * first if solver == "euler" else x + h / 2 * (first + velocity(x + h * first, k / 9 + h))
    expected = policy.finish(x)
    found = build_sampler(policy, batch_size=5, num_steps=9, solver=solver, schedule=schedule)(
        observations, noise
    )
    torch.testing.assert_close(normalized(policy, found), normalized(policy, expected), rtol=0, atol=1e-5)
    plain = policy.act(observations, num_steps=9, solver=solver, noise=noise)
    assert (normalized(policy, found) - normalized(policy, plain)).abs().max() > 1e-3  # it does cache


@pytest.mark.parametrize("backend", ["compile", "onnx"])
@pytest.mark.parametrize(("num_steps", "cached", "solver"), [
    (4, False, "euler"), (8, True, "euler"), (20, False, "euler"), (20, True, "euler"), (10, True, "heun"),
    (4, True, "ab3"), (20, False, "ab2"), (4, True, "taylor"),
])  # fmt: skip
def test_every_backend_computes_what_eager_does(
    backend, num_steps, cached, solver, policy, observations, noise, exports
):
    schedule = some_schedule(policy, num_steps, solver=solver) if cached else None
    expected = build_sampler(policy, batch_size=5, num_steps=num_steps, solver=solver, schedule=schedule)(
        observations, noise
    )
    sampler = build_sampler(
        policy,
        batch_size=5,
        num_steps=num_steps,
        solver=solver,
        schedule=schedule,
        backend=backend,
        exports=exports,
    )
    for _ in range(2):  # nothing is left over from the first call
        found = sampler(observations, noise)
        error = (normalized(policy, found) - normalized(policy, expected)).abs().max()
        assert error < 1e-4
    # Other inputs after these: the buffers are written anew.
    other = random_observations(5, seed=3)
    error = sampler(other, -noise) - build_sampler(
        policy, batch_size=5, num_steps=num_steps, solver=solver, schedule=schedule
    )(other, -noise)
    assert error.abs().max() < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_number_of_rows_passes_in_parts(backend, policy, exports):
    observations, noise = random_observations(12), torch.randn(12, 4, 2)
    expected = policy.act(observations, num_steps=4, noise=noise)
    sampler = build_sampler(policy, batch_size=5, num_steps=4, backend=backend, exports=exports)
    torch.testing.assert_close(sampler(observations, noise), expected, rtol=0, atol=1e-4)
    generator = torch.Generator().manual_seed(3)
    again = sampler.act(observations, generator=generator)
    drawn = policy.act(observations, num_steps=4, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(again, drawn, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("backend", "dtype"), [("eager", "bfloat16"), ("onnx", "int8")])
def test_reduced_precision_is_near(backend, dtype, policy, observations, noise, exports):
    expected = normalized(policy, policy.act(observations, num_steps=4, noise=noise))
    sampler = build_sampler(policy, batch_size=5, num_steps=4, backend=backend, dtype=dtype, exports=exports)
    found = normalized(policy, sampler(observations, noise))
    error = (found - expected).abs()
    assert error.max() > 1e-5
    assert error.mean() < 0.1


def test_an_onnx_sampler_is_built_again_from_what_was_exported(
    policy, observations, noise, exports, monkeypatch
):
    first = build_sampler(policy, batch_size=5, num_steps=2, backend="onnx", exports=exports)
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: pytest.fail("it was exported again"))
    again = build_sampler(policy, batch_size=5, num_steps=2, backend="onnx", exports=exports)
    assert torch.equal(again(observations, noise), first(observations, noise))
    with pytest.raises(FlowPolicyError, match="differs from the policy"):  # another policy's are not taken
        build_sampler(random_policy(seed=4), batch_size=5, num_steps=2, backend="onnx", exports=exports)


def test_a_sampler_keeps_the_weights_it_was_built_with(observations, noise):
    policy = random_policy(seed=4)
    sampler = build_sampler(policy, batch_size=5, num_steps=4)
    before = sampler(observations, noise)
    with torch.no_grad():
        policy.network.embed_action.weight.mul_(2)
    assert torch.equal(sampler(observations, noise), before)


def test_a_shortcut_policy_tuned_for_one_k_is_refused_another(observations):
    policy = random_policy("shortcut", tuned=SamplerSpec(num_steps=4, solver="euler"))
    assert build_sampler(policy).sampling.num_steps == 4
    with pytest.raises(ConfigError, match="tuned for num_steps=4"):
        build_sampler(policy, num_steps=8)


def test_what_a_sampler_was_not_built_for_is_refused(policy, observations, noise):
    sampler = build_sampler(policy, batch_size=5, num_steps=4)
    with pytest.raises(ConfigError, match="built for num_steps=4, solver=euler"):
        sampler.act(observations, num_steps=8)
    with pytest.raises(FlowPolicyError, match="NaN"):
        sampler({**observations, "goal": observations["goal"] * float("nan")})
    with pytest.raises(FlowPolicyError, match="must be"):
        sampler(observations, noise[:2])
    with pytest.raises(ConfigError, match="backend"):
        build_sampler(policy, backend="tensorrt")
    with pytest.raises(ConfigError, match="dtype"):
        build_sampler(policy, dtype="float16")
    with pytest.raises(ConfigError, match="onnx takes float32 or int8"):
        build_sampler(policy, backend="onnx", dtype="bfloat16")
    with pytest.raises(ConfigError, match="needs the policy on a GPU"):
        build_sampler(policy, backend="cuda_graph")


@pytest.mark.parametrize("change", ["checkpoint", "steps", "solver", "grid", "shape"])
def test_a_schedule_for_something_else_is_refused(change, policy):
    schedule = some_schedule(policy, 8)
    other, steps, solver = policy, 8, "euler"
    if change == "checkpoint":
        other = random_policy(seed=1)
    elif change == "steps":
        steps = 9
    elif change == "solver":
        solver = "heun"
    elif change == "grid":
        schedule = dataclasses.replace(
            schedule, key=dataclasses.replace(schedule.key, grid={"name": "shifted"})
        )
    else:
        schedule = dataclasses.replace(schedule, key=dataclasses.replace(schedule.key, chunk_shape=(8, 2)))
    with pytest.raises(ConfigError, match=r"was made for another .*calibrate-cache"):
        build_sampler(other, batch_size=1, num_steps=steps, solver=solver, schedule=schedule)


def test_a_backend_that_is_not_installed_says_so(policy, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"flowpolicy\[onnx\]"):
        build_sampler(policy, backend="onnx")


def test_an_export_that_differs_is_refused(policy, monkeypatch, exports):
    right = {name: part for name, part in exports.items() if name != "readout"}
    readout = type(policy.network).readout
    exporting = torch.compiler.is_exporting

    def wrong(self, h, modulation):
        result = readout(self, h, modulation)
        return result * 1.01 if exporting() else result

    monkeypatch.setattr(type(policy.network), "readout", wrong)
    with pytest.raises(FlowPolicyError, match="ONNX export differs"):
        build_sampler(policy, batch_size=5, num_steps=4, backend="onnx", exports=right)


def test_saved_schedules_come_back(policy, tmp_path):
    schedule = some_schedule(policy, 8)
    again = Schedule.load(schedule.save(tmp_path / "schedule.json"))
    assert again == schedule
    assert again.share == sum(len(steps) for steps in schedule.updates) / (6 * 8)
    for text, message in (("{", "not readable"), ("{}", "not a cache schedule"), (None, "No cache schedule")):
        file = tmp_path / f"{message}.json"
        if text is not None:
            file.write_text(text)
        with pytest.raises(FlowPolicyError, match=message):
            Schedule.load(file)
    key = schedule.key
    for updates in (((0,),) * 5, ((1,),) * 6, ((0, 8),) * 6, ((0, 3, 3),) * 6):
        with pytest.raises(ConfigError, match="updates"):
            Schedule(key, updates, "broken")


def test_the_fewest_updates_still_give_a_chunk(policy, observations, noise, exports):
    key = ScheduleKey.of(policy, SamplerSpec(num_steps=30))
    schedule = Schedule(key, (uniform(30, 1),) * len(key.blocks), "uniform")
    for backend in ("eager", "onnx"):
        sampler = build_sampler(
            policy, batch_size=5, num_steps=30, schedule=schedule, backend=backend, exports=exports
        )
        chunk = sampler(observations, noise)
        assert torch.isfinite(chunk).all()
