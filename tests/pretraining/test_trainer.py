import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_training import toy_settings, toy_trainer, write_toy_store

from flowpolicy import CheckpointError, ConfigError, FlowPolicy, FlowPolicyError
from flowpolicy.flow import OBJECTIVES
from flowpolicy.models.config import MLPConfig
from flowpolicy.pretraining.ema import EMA
from flowpolicy.pretraining.run import pretrain
from flowpolicy.runs.distributed import Processes
from flowpolicy.runs.loggers import read_metrics
from flowpolicy.runs.run_folder import FINETUNING, claim

ALL = sorted(OBJECTIVES)


def weights(trainer):
    """Live and averaged weights, and the optimiser's moments, by name."""
    tensors = {("live", name): tensor for name, tensor in trainer.policy.network.state_dict().items()}
    tensors |= {("average", name): tensor for name, tensor in trainer.ema.network.state_dict().items()}
    for index, moments in trainer.optimizer.state_dict()["state"].items():
        tensors |= {(index, name): tensor for name, tensor in moments.items()}
    return tensors


def equal(first, second):
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "bar"), [("regression", 0.12), ("flow_matching", 0.3)])
def test_training_beats_a_bar_on_held_out_episodes(policy, bar):
    """Root mean square error of normalised actions; untrained networks make 0.4 to 0.9."""
    trainer = toy_trainer(policy, steps=120, batch_size=64, learning_rate=6e-3)
    before = trainer.validate()["validation/action_error"]
    assert before > 2 * bar
    trainer.run()
    after = trainer.validate()["validation/action_error"]
    assert after < bar


@pytest.mark.slow
@pytest.mark.usefixtures("empty_figures")
def test_a_network_named_in_the_settings_is_trained_and_kept(tmp_path):
    store = write_toy_store(tmp_path / "demos.zarr")
    settings = toy_settings(store=store, steps=250, learning_rate=3e-3, save_every=250)
    pretrain({**settings, "model": {"network": "mlp", "width": 16, "hidden": 64}}, tmp_path / "run")
    policy = FlowPolicy.load(tmp_path / "run" / "checkpoint")
    assert policy.config.model == MLPConfig(width=16, hidden=64)
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    errors = [
        row["validation/action_error"] for row in rows if row.get("validation/action_error") is not None
    ]
    assert errors[-1] < 0.3 < errors[0]


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_resumed_run_is_the_unbroken_run_bit_for_bit(tmp_path, policy, dropout):
    unbroken = toy_trainer(policy, dropout=dropout, steps=9, save_every=100)
    unbroken.run()
    first = toy_trainer(policy, tmp_path, dropout=dropout, steps=9, save_every=4)
    for _ in range(4):
        first.step()
    first.save()
    first.step()  # this step is lost
    torch.manual_seed(12345)  # the state of torch's own generator plays no part
    second = toy_trainer(policy, tmp_path, dropout=dropout, steps=9, save_every=4)
    assert second.resume()
    assert second.state.step == 4
    second.run()
    assert equal(second, unbroken)
    assert not equal(second, first)


def test_the_seconds_of_all_parts_of_a_run_add_up(tmp_path, monkeypatch):
    clock = iter(range(0, 1_000_000, 100))
    monkeypatch.setattr("flowpolicy.pretraining.trainer.time.perf_counter", lambda: next(clock))
    seconds = [0.0]
    for _ in range(3):
        trainer = toy_trainer("regression", tmp_path, steps=2, save_every=2)
        trainer.resume()
        seconds.append(trainer.state.seconds)
        trainer.state.step = 0
        trainer.run()
    assert seconds[:2] == [0, 0]
    assert seconds[3] == 2 * seconds[2] > 0


def test_runs_repeat_with_the_seed_and_differ_without():
    first, second, other = (toy_trainer("shortcut", steps=3, seed=seed) for seed in (1, 1, 2))
    for trainer in (first, second, other):
        trainer.run()
    assert equal(first, second)
    assert not equal(first, other)


def test_validation_and_saving_do_not_change_what_is_trained(tmp_path):
    plain = toy_trainer("shortcut", dropout=0.2, steps=6, validate_every=0, save_every=100)
    busy = toy_trainer("shortcut", tmp_path, dropout=0.2, steps=6, validate_every=1, save_every=1)
    plain.run()
    busy.run()
    assert equal(plain, busy)


def test_the_saved_policy_holds_the_averaged_weights(tmp_path):
    trainer = toy_trainer("flow_matching", tmp_path, steps=5)
    result = trainer.run()
    saved = FlowPolicy.load(tmp_path / "checkpoint")
    average = trainer.ema.network.state_dict()
    for policy in (saved, result):
        assert all(torch.equal(tensor, average[name]) for name, tensor in policy.network.state_dict().items())
    assert not equal_networks(saved.network, trainer.policy.network)


def equal_networks(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("policy", ALL)
def test_bfloat16_takes_batches_of_any_size(policy):
    for batch_size in (1, 2, 4, 5, 8):  # a shortcut model's bootstrap has one row up to 4
        trainer = toy_trainer(policy, steps=1, batch_size=batch_size, precision="bfloat16")
        exact = toy_trainer(policy, steps=1, batch_size=batch_size, precision="float32")
        loss, wanted = (float(t.step()["loss/total"]) for t in (trainer, exact))
        assert math.isclose(loss, wanted, rel_tol=0.05)


def test_the_average_by_hand():
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(network.weight)
    ema = EMA(network, 0.5)
    torch.nn.init.ones_(network.weight)
    ema.update(0)  # decay min(0.5, 1 / 10)
    assert float(ema.network.weight) == pytest.approx(0.9)
    ema.update(1000)  # decay 0.5
    assert float(ema.network.weight) == pytest.approx(0.95)
    assert network.weight.item() == 1
    assert not ema.network.weight.requires_grad


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    trainer = toy_trainer(
        "regression", steps=110, warmup_steps=10, learning_rate=1e-2, final_learning_rate=0.1
    )
    rate = trainer._learning_rate
    assert rate(0) == pytest.approx(1e-3)
    assert rate(9) == pytest.approx(1e-2)
    assert rate(10) == pytest.approx(1e-2)
    assert rate(60) == pytest.approx(1e-2 * (0.1 + 0.9 / 2))
    assert rate(110) == pytest.approx(1e-3)
    trainer.step()
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {rate(0)}


def test_gradients_are_clipped_and_only_matrices_decay():
    trainer = toy_trainer("flow_matching", gradient_clip=1e-3)
    for _ in range(3):
        norm = trainer.step()["train/gradient_norm"]
    assert norm > 1e-3  # before clipping
    total = math.sqrt(sum(float(p.grad.square().sum()) for p in trainer.policy.network.parameters()))
    assert total == pytest.approx(1e-3, rel=1e-3)
    matrices, others = trainer.optimizer.param_groups
    assert matrices["weight_decay"] > 0
    assert others["weight_decay"] == 0
    assert all(p.dim() >= 2 for p in matrices["params"])


def test_the_parts_of_a_batch_are_the_whole():
    whole = toy_trainer("shortcut", batch_size=16)
    batch, draws = whole.batch(3)
    parts = [toy_trainer("shortcut", batch_size=16) for _ in range(2)]
    for rank, trainer in enumerate(parts):
        trainer.processes = Processes(rank, 2)
        part, part_draws = trainer.batch(3)
        rows = slice(8 * rank, 8 * rank + 8)
        assert torch.equal(part.action, batch.action[rows])
        assert torch.equal(part.observation["observation"], batch.observation["observation"][rows])
        assert torch.equal(part_draws.noise, draws.noise[rows])
        assert torch.equal(part_draws.d > 0, torch.arange(8) % 4 == 0)


def test_a_batch_that_cannot_be_shared_out_is_refused():
    class Three(Processes):
        def share(self, tensors):
            pass

    with pytest.raises(ConfigError, match=r"multiple of 12"):
        toy_trainer("shortcut", batch_size=16, processes=Three(0, 3))


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(tmp_path):
    trainer = toy_trainer("regression", tmp_path, steps=20, log_every=2, save_every=2)
    for _ in range(2):
        trainer.step()
    trainer.save()
    with torch.no_grad():
        trainer.policy.network.output.weight.fill_(math.nan)
    with pytest.raises(FlowPolicyError, match=r"not finite at step 4; lower train.learning_rate"):
        trainer.run()
    FlowPolicy.load(tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        ({"seed": 2, "train": {"batch_size": 16}}, "seed=1 and not 2"),
        ({"seed": 1, "train": {"batch_size": 32}}, "train.batch_size=16 and not 32"),
        ({"seed": 1, "train": {"batch_size": 16}, "model": 3}, "model=None and not 3"),
    ],
)
def test_resuming_with_other_settings_is_refused_and_names_the_first(tmp_path, ours, words):
    saved = {"seed": 1, "train": {"batch_size": 16}}
    toy_trainer("regression", tmp_path, settings=saved).save()
    assert toy_trainer("regression", tmp_path, settings=dict(saved)).resume()
    with pytest.raises(CheckpointError, match=words):
        toy_trainer("regression", tmp_path, settings=ours).resume()


@pytest.mark.parametrize("damage", ["cut", "empty", "json", "missing", "list", "settings"])
def test_a_damaged_training_state_is_one_sentence(tmp_path, damage):
    trainer = toy_trainer("regression", tmp_path)
    trainer.step()
    trainer.save()
    tensors, state = (tmp_path / "training_state" / name for name in ("state.safetensors", "state.json"))
    if damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif damage == "empty":
        tensors.write_bytes(b"")
    elif damage == "missing":
        tensors.unlink()
    else:
        state.write_text(
            {"json": '{"step": 1', "list": "[]", "settings": '{"step": 1, "settings": 3}'}[damage]
        )
    with pytest.raises(CheckpointError, match="damaged") as refused:
        toy_trainer("regression", tmp_path).resume()
    assert "\n" not in str(refused.value)


def test_nothing_to_resume_is_a_fresh_start(tmp_path):
    assert not toy_trainer("regression", tmp_path).resume()
    assert not toy_trainer("regression").resume()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_toy_store(tmp_path_factory.mktemp("demos") / "toy.zarr.zip")


def test_a_run_leaves_what_it_promises(tmp_path, store):
    summary = json.loads(
        pretrain(toy_settings("shortcut", store), tmp_path, command="the command").read_text()
    )
    assert summary["task"] == "toy"
    assert summary["policy"] == "shortcut"
    assert summary["steps"] == 40
    assert summary["command"] == "the command"
    assert summary["metrics"]["demo_return_mean"] < 0
    assert summary["metrics"]["validation/action_error"] > 0
    assert summary["metrics"]["lost_actions"] == 0
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    assert "validation/loss" in rows[1]
    assert "validation/loss" not in rows[0]
    assert (tmp_path / "curves.png").stat().st_size > 1000
    policy = FlowPolicy.load(tmp_path / "checkpoint")
    assert policy.spec.task["env_id"] == "Pendulum-v1"
    assert policy.act(torch.zeros(2, 1, 3)).shape == (2, 4, 1)
    with pytest.raises(ConfigError, match="resume=true"):
        pretrain(toy_settings("shortcut", store), tmp_path)
    other = {**toy_settings("shortcut", store, batch_size=20), "resume": True}
    with pytest.raises(CheckpointError, match=r"train.batch_size=16 and not 20"):
        pretrain(other, tmp_path)
    # how often to report is no part of what must agree
    again = {**toy_settings("shortcut", store, log_every=3, save_every=7), "resume": True}
    assert pretrain(again, tmp_path).exists()


@pytest.mark.usefixtures("empty_figures")
def test_actions_that_a_narrow_clip_cuts_off_are_reported(tmp_path, store, caplog):
    settings = toy_settings("flow_matching", store, steps=1, validate_every=0)
    settings["data"] |= {"action_clip": 0.5, "observation_normalization": "none"}
    lost = json.loads(pretrain(settings, tmp_path).read_text())["metrics"]["lost_actions"]
    assert 0.05 < lost < 0.9
    assert f"{100 * lost:.3g}% of the demonstrated steps have an action beyond 0.5" in caplog.text
    metadata = FlowPolicy.load(tmp_path / "checkpoint").spec.metadata
    assert metadata["lost_actions"] == lost
    assert metadata["lost_observations"] == {"observation": 0.0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train": {"stepz": 3}}, r"did you mean 'train.steps'"),
        ({"polcy": {}}, r"did you mean 'policy'"),
        ({"policy": {"name": "shortcut", "max_step": 3}}, "max_steps"),
        ({"seed": -1}, "seed is -1"),
        ({"device": "cuda:77"}, "device=cuda:77 is not available"),
        ({"data": {"observation_keys": ["pose"]}}, "'pose'"),
        ({"env": {"name": "toy", "env_id": "Pendulum-v1"}}, "names no demonstrations"),
        ({"env": {"name": "toy", "env_id": "Nothing-v0", "demonstrations": "toy"}}, "toy"),
    ],
)
def test_mistakes_are_refused_before_training(tmp_path, store, change, words):
    with pytest.raises(FlowPolicyError, match=words):
        pretrain({**toy_settings("shortcut", store), **change}, tmp_path / "run")
    assert not (tmp_path / "run" / "training_state").exists()


class Pair(Processes):
    """This process beside one whose numbers are three times as large; it needs no other."""

    def gather(self, *values):
        return [list(values), [3 * value for value in values]]

    def average_gradients(self, parameters):
        pass

    def share(self, tensors):
        pass

    def wait(self):
        pass


def test_what_two_processes_log_is_the_mean_of_both():
    class Sink:
        def __init__(self):
            self.rows = []

        def log(self, step, metrics):
            self.rows.append(metrics)

    sink = Sink()
    trainer = toy_trainer("flow_matching", processes=Pair(0, 2), loggers=[sink], steps=1, log_every=1)
    step, own = trainer.step, []
    trainer.step = lambda: own.append(step()) or own[-1]
    trainer.run()
    assert sink.rows[0]["loss/total"] == pytest.approx(2 * float(own[0]["loss/total"]))


@pytest.mark.usefixtures("empty_figures")
def test_a_finished_run_without_its_checkpoint_writes_it_again_and_without_its_state_is_refused(tmp_path):
    settings = toy_settings(store=write_toy_store(tmp_path / "toy.zarr.zip"), steps=4)
    summary = pretrain(settings, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint"
    weights = (checkpoint / "model.safetensors").read_bytes()
    shutil.rmtree(checkpoint)
    with pytest.raises(ConfigError, match="resume=true"):
        pretrain(settings, tmp_path / "run")
    assert pretrain({**settings, "resume": True}, tmp_path / "run") == summary
    assert (checkpoint / "model.safetensors").read_bytes() == weights
    shutil.rmtree(tmp_path / "run" / "training_state")
    for resume, words in ((True, "training_state is gone"), (False, "holds a run already")):
        with pytest.raises(ConfigError, match=words):
            pretrain({**settings, "resume": resume}, tmp_path / "run")
    assert (checkpoint / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("resume", [False, True])
def test_the_folder_of_another_kind_of_run_is_refused_and_left_alone(tmp_path, resume):
    settings = toy_settings(store=write_toy_store(tmp_path / "toy.zarr.zip"), steps=4)
    claim(tmp_path / "run", FINETUNING)
    with pytest.raises(ConfigError, match="holds a run of 'finetune_reinflow', and this is 'pretrain'"):
        pretrain({**settings, "resume": resume}, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("optimizer.0.exp_avg_sq", lambda tensor: -torch.ones_like(tensor)),
        ("optimizer.0.step", lambda tensor: torch.tensor([1.0, 2.0])),
        ("optimizer.0.exp_avg", lambda tensor: None),
        ("optimizer.-1.exp_avg", lambda tensor: torch.zeros(1)),
        ("optimizer.99999.exp_avg", lambda tensor: torch.zeros(1)),
        ("optimizer.0.momentum", lambda tensor: torch.zeros(1)),
        ("network.output.bias", lambda tensor: tensor.double() + 1e300),
        ("network.output.bias", lambda tensor: tensor.int()),
        ("averaged.output.bias", lambda tensor: tensor[None]),
        ("averaged.extra", lambda tensor: torch.zeros(1)),
    ],
)
def test_a_training_state_of_other_tensors_is_refused_and_changes_nothing(tmp_path, name, change):
    trainer = toy_trainer("regression", tmp_path)
    trainer.step()
    trainer.save()
    file = tmp_path / "training_state" / "state.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    changed = change(tensors.pop(name, torch.zeros(1)))
    save_file(tensors if changed is None else {**tensors, name: changed}, file)
    fresh = toy_trainer("regression", tmp_path)
    before = [parameter.clone() for parameter in fresh.policy.network.parameters()]
    with pytest.raises(CheckpointError, match=str(tmp_path)) as refused:
        fresh.resume()
    assert str(refused.value).isprintable()
    assert all(
        torch.equal(old, new) for old, new in zip(before, fresh.policy.network.parameters(), strict=True)
    )
