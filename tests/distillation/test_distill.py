import dataclasses
import json

import pytest
import torch
from toy_training import MODEL, toy_settings, toy_trainer, write_toy_store

from flowpolicy import ConfigError, FlowPolicy, FlowPolicyError
from flowpolicy.data.sampling import Batch
from flowpolicy.distillation.method import FewSteps
from flowpolicy.distillation.methods import METHODS, build_method
from flowpolicy.distillation.methods.adversarial import ChunkCritic
from flowpolicy.distillation.run import distill
from flowpolicy.flow.objective import Draws
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.pretraining.training_run import TrainingRun


@pytest.fixture(scope="module")
def teacher():
    return toy_trainer("flow_matching", steps=5, learning_rate=1e-2).run()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, teacher):
    """A teacher and the store that it was trained on."""
    folder = tmp_path_factory.mktemp("teacher")
    write_toy_store(folder / "toy.zarr.zip")
    teacher.save(folder / "checkpoint")
    return folder


def settings(folder, **changes):
    toy = toy_settings(store=folder / "toy.zarr.zip")
    train = {
        **toy["train"],
        "steps": 8,
        "batch_size": 8,
        "validate_every": 4,
        "save_every": 4,
        "log_every": 4,
    }
    return {
        "env": toy["env"], "checkpoint": str(folder / "checkpoint"), "method": {"name": "direct"},
        "pairs": {"count": 300, "num_steps": 8, "path": str(folder / "pairs")},
        "data": toy["data"], "train": train, "video": False, "device": "cpu", **changes,
    }  # fmt: skip


def paired(teacher, method, done=1.0, rows=6):
    """A batch of random pairs, and its draws."""
    generator = torch.Generator().manual_seed(0)
    shape = (rows, *teacher.spec.chunk_shape)
    observation = {"observation": torch.randn((rows, 1, 3), generator=generator)}
    chunk, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    batch = Batch(observation, chunk, torch.ones(shape[:2], dtype=torch.bool), noise)
    return batch, method.pair(method.draw(shape, generator, "cpu"), noise, done)


FEW = [
    {"name": name, "num_steps": k}
    for name, kind in METHODS.items()
    for k in (1, 2)
    if issubclass(kind, FewSteps)
]


@pytest.mark.parametrize(
    "given", [*FEW, {"name": "imitate"}], ids=lambda given: "-".join(map(str, given.values()))
)
def test_a_loss_is_a_number_with_gradients_and_leaves_the_teacher_alone(teacher, given):
    method = build_method(given, teacher)
    student = toy_trainer("flow_matching", steps=1).policy
    batch, draws = paired(teacher, method)
    loss, metrics = method.loss(student.network, batch, draws)
    loss.backward()
    assert all(torch.isfinite(value) for value in metrics.values())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.network.parameters())
    assert all(p.grad is None for p in teacher.network.parameters())


@torch.no_grad()
def test_direct_is_the_distance_of_the_chunk_that_euler_steps_make(teacher):
    network = teacher.network
    for num_steps in (1, 2):
        method = build_method({"name": "direct", "num_steps": num_steps}, teacher)
        batch, draws = paired(teacher, method)
        context, x, zero = network.encode(batch.observation), batch.noise, torch.zeros(1)
        for k in range(num_steps):
            x = x + network.velocity(x, zero + k / num_steps, zero, context) / num_steps
        loss, _ = method.loss(network, batch, draws)
        torch.testing.assert_close(loss, (x - batch.action).square().mean())


def test_adversarial_gradients_are_those_of_a_computation_by_hand(teacher):
    method = build_method({"name": "adversarial", "anchor": 3.0, "penalty": 0.7, "num_steps": 2}, teacher)
    critic = ChunkCritic(teacher, widths=())  # D = a x + b o + c
    torch.nn.init.normal_(critic.layers[0].weight)
    vars(method)["critic"] = critic
    student = toy_trainer("flow_matching", steps=1).policy.network
    batch, draws = paired(teacher, method)
    parameters = [*student.parameters(), *critic.parameters()]
    found = torch.autograd.grad(method.loss(student, batch, draws)[0], parameters, allow_unused=True)

    x = method.sample(student, student.encode(batch.observation), batch.noise)
    a, inside = critic.layers[0].weight.detach()[0, 3:].reshape(4, 1), x.detach().abs() < 1
    made = x.detach().clamp(-1, 1)
    mistaken = torch.sigmoid(((made - batch.action) * a).sum((1, 2)))[:, None, None]  # the critic is
    descent = -(1 - mistaken) * a * inside / len(x) + 2 * 3.0 * (x.detach() - batch.action) / x.numel()
    expected = torch.autograd.grad(x, list(student.parameters()), descent, allow_unused=True)
    slope = (mistaken * (made - batch.action)).mean(0) + 2 * 0.7 * a
    of_critic = [torch.cat([torch.zeros(3), slope[:, 0]])[None], torch.zeros(1)]
    for one, other in zip(found, [*expected, *of_critic], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_reflow_and_slimflow_at_the_start_of_a_step_are_the_direct_loss_but_for_their_norm(teacher):
    slim, direct = (build_method({"name": name}, teacher) for name in ("slimflow", "direct"))
    batch, draws = paired(teacher, slim)
    assert torch.equal(draws.noise, batch.noise)
    assert not draws.t.any()
    _, metrics = slim.loss(teacher.network, batch, draws)
    loss, _ = direct.loss(teacher.network, batch, Draws(batch.noise, draws.t, draws.d))
    torch.testing.assert_close(metrics["loss/reflow"], loss.detach())


def test_slimflow_goes_from_fresh_noise_to_that_of_the_pairs(teacher):
    slim = build_method({"name": "slimflow", "annealing": 0.5, "num_steps": 2}, teacher)
    shape, noise = (2000, 4, 1), torch.full((2000, 4, 1), 3.0)
    draws = slim.draw(shape, torch.Generator().manual_seed(0), "cpu")
    fresh, half, end = (slim.pair(draws, noise, done) for done in (0.0, 0.25, 0.5))
    assert torch.equal(fresh.noise, draws.noise)
    assert float(half.noise.std()) == pytest.approx(0.5, abs=0.02)  # of z; the other part is constant here
    assert torch.equal(end.noise, noise)
    assert torch.equal(half.t, draws.t)
    assert set(end.t.tolist()) == {0.0, 0.5}


def test_the_student_is_a_policy_of_its_k_and_better_there_than_its_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingRun, "_plot", lambda *_: None)
    write_toy_store(tmp_path / "toy.zarr.zip")
    toy_trainer("shortcut", steps=20, learning_rate=1e-2).run().save(tmp_path / "checkpoint")
    given = settings(tmp_path)
    given["pairs"] = {"count": 500}  # K = 32, the finest of a shortcut model
    given["train"] |= {"steps": 50, "learning_rate": 1e-2, "batch_size": 32}
    summary = json.loads(distill(given, tmp_path / "run", command="the command").read_text())
    student, teacher = (FlowPolicy.load(path / "checkpoint") for path in (tmp_path / "run", tmp_path))
    assert student.sampling.num_steps == summary["metrics"]["num_steps"] == 1
    assert student.spec.metadata["distillation"]["method"] == {"name": "direct"}
    generator = torch.Generator().manual_seed(0)
    observation, noise = (
        torch.randn((64, 1, 3), generator=generator),
        torch.randn((64, 4, 1), generator=generator),
    )
    fine = teacher.act(observation, num_steps=32, noise=noise)
    before, after = (
        float((policy.act(observation, num_steps=1, noise=noise) - fine).square().mean())
        for policy in (teacher, student)
    )
    assert after < 0.6 * before
    with pytest.raises(ConfigError, match="tuned for num_steps=1"):
        student.act(observation, num_steps=2)


def steered(policy):
    """The best of eight chunks by a critic that nobody has trained."""
    steering = {"name": "best_of", "proposals": 8, "members": 2, "hidden": [8]}
    torch.manual_seed(0)
    result = FlowPolicy(dataclasses.replace(policy.config, steering=steering))
    result.load_state_dict(policy.state_dict(), strict=False)
    for layer in result.steering.critic.ensemble.layers:
        torch.nn.init.normal_(layer.weight)
    return result.eval()


def test_a_student_that_imitates_does_what_a_steering_chose_and_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingRun, "_plot", lambda *_: None)
    write_toy_store(tmp_path / "toy.zarr.zip")
    flow = toy_trainer("flow_matching", steps=1).policy.eval()  # wide, so that there is something to choose
    teacher = steered(flow)
    teacher.save(tmp_path / "checkpoint")
    given = settings(tmp_path, method={"name": "imitate"})
    given["train"] |= {"steps": 150, "learning_rate": 1e-2, "batch_size": 64}
    summary = json.loads(distill(given, tmp_path / "run").read_text())
    student = FlowPolicy.load(tmp_path / "run" / "checkpoint")
    assert student.steering is student.config.tuned is None
    assert summary["metrics"]["method"] == "imitate"
    observation = {"observation": torch.randn(200, 1, 3, generator=torch.Generator().manual_seed(0))}
    generator = torch.Generator().manual_seed(1)
    values = []
    for policy, steps in ((flow, 4), (student, 4), (student, 8), (teacher, 4)):
        noise = policy.noise(200, None, generator)
        chunk = policy.sample(observation, noise, policy.checked(SamplerSpec(num_steps=steps)))
        values.append(teacher.steering.critic(observation, chunk[:, None]).mean().item())
    before, learnt, finer, best = values
    assert min(learnt, finer) > before + 0.6 * (best - before)
    assert best > before + 0.5
    with pytest.raises(ConfigError, match="method=direct takes a policy without steering"):
        distill(settings(tmp_path), tmp_path / "direct")


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"name": "slimflow"}, "model": {**MODEL, "width": 8}},
        {"method": {"name": "adversarial"}},  # its critic and the critic's moments are of the state
    ],
)
def test_a_resumed_run_is_the_unbroken_one(tmp_path, folder, monkeypatch, changes):
    monkeypatch.setattr(TrainingRun, "_plot", lambda *_: None)
    distill(settings(folder, **changes), tmp_path / "whole")
    broken = settings(folder, **changes)
    monkeypatch.setattr("flowpolicy.pretraining.trainer.Trainer._log", _killed_at_the_second_call())
    with pytest.raises(KeyboardInterrupt):
        distill(broken, tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setattr(TrainingRun, "_plot", lambda *_: None)
    distill({**broken, "resume": True}, tmp_path / "run")
    for file in ("checkpoint/model.safetensors", "training_state/state.safetensors"):
        first, second = ((tmp_path / name / file).read_bytes() for name in ("whole", "run"))
        assert first == second
    width = changes.get("model", MODEL)["width"]
    assert FlowPolicy.load(tmp_path / "run" / "checkpoint").config.model.width == width


def _killed_at_the_second_call():
    calls = []

    def log(self, metrics):
        calls.append(metrics)
        if self.state.step > 4:
            raise KeyboardInterrupt

    return log


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": {"name": "directt"}}, r"method is 'directt' \(did you mean 'direct'"),
        ({"method": {"name": "direct", "steps": 1}}, "method.steps"),
        ({"env": None}, "names no demonstrations; add data.path"),
        ({"checkpoint": "nowhere"}, "No checkpoint at nowhere"),
    ],
)
def test_mistakes_are_refused_before_any_work(tmp_path, folder, change, words):
    with pytest.raises(FlowPolicyError, match=words):
        distill(settings(folder, **change), tmp_path / "run")
    assert not (tmp_path / "run" / "training_state").exists()


def test_a_policy_that_is_no_flow_has_nothing_to_distil():
    with pytest.raises(ConfigError, match="has no flow to integrate"):
        build_method({"name": "direct"}, toy_trainer("regression").policy)
