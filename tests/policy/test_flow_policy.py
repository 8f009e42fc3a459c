import dataclasses
import json
import sys
import types

import numpy as np
import pytest
import torch

from flowpolicy import CheckpointError, ConfigError, FlowPolicy, FlowPolicyError, PolicyConfig
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.models.config import MLPConfig, TransformerConfig

B, T_O, T, A = 3, 2, 4, 2
OFFSET, SPREAD = torch.tensor([100.0, -7.0]), torch.tensor([20.0, 0.5])  # of the actions' range


def make(objective="shortcut", *, seed=0, **changes):
    """A policy with random weights and normalisers fitted to actions in OFFSET +- SPREAD."""
    torch.manual_seed(seed)
    config = PolicyConfig(
        objective={"name": objective},
        model=TransformerConfig(width=16, depth=1, num_heads=2),
        observations={"observation": (5,)},
        action_dim=A,
        obs_horizon=T_O,
        action_horizon=T,
        execute_horizon=2,
        task={"name": "toy"},
        metadata={"steps": 7},
    )
    policy = FlowPolicy(dataclasses.replace(config, **changes)).eval()
    for parameter in policy.network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    generator = torch.Generator().manual_seed(seed)
    action = OFFSET + SPREAD * torch.linspace(-1, 1, 50)[:, None]
    policy.fit_normalizers({"observation": 30 + 10 * torch.randn(50, 5, generator=generator)}, action)
    return policy


def seen(count=B, seed=3):
    return {
        "observation": 30 + 10 * torch.randn(count, T_O, 5, generator=torch.Generator().manual_seed(seed))
    }


NOISE = torch.randn(B, T, A, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("objective", ["flow_matching", "shortcut", "regression", "mip"])
@pytest.mark.parametrize(
    "model",
    [
        TransformerConfig(width=16, depth=1, num_heads=2, actions_per_token=2),
        MLPConfig(width=16, hidden=24),
    ],
)
def test_saved_and_loaded_policies_act_alike_bit_for_bit(tmp_path, objective, model):
    policy = make(objective, model=model)
    loaded = FlowPolicy.load(policy.save(tmp_path / "checkpoint"))
    assert torch.equal(loaded.act(seen(), noise=NOISE), policy.act(seen(), noise=NOISE))
    assert loaded.config == policy.config
    assert loaded.spec.name == objective
    assert not loaded.training
    names = sorted(file.name for file in (tmp_path / "checkpoint").iterdir())
    assert names == ["config.json", "model.safetensors"]


def test_half_precision_on_disk_is_close_and_float32_in_memory(tmp_path):
    policy = make()
    full, half = policy.save(tmp_path / "full"), policy.save(tmp_path / "half", dtype=torch.float16)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (full, half)]
    assert sizes[1] < 0.6 * sizes[0]
    loaded = FlowPolicy.load(half)
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())
    assert torch.equal(loaded.action_normalizer.scale, policy.action_normalizer.scale)
    difference = (loaded.act(seen(), noise=NOISE) - policy.act(seen(), noise=NOISE)).abs() / SPREAD
    assert 0 < difference.max() < 0.02


def test_act_returns_float32_chunks_whatever_it_is_given():
    policy = make()
    wanted = policy.act(seen(), noise=NOISE)
    assert wanted.shape == (B, T, A)
    assert wanted.dtype == torch.float32
    assert not wanted.requires_grad
    plain = seen()["observation"]
    for observation in (plain, plain.numpy(), plain.double().numpy(), {"observation": plain.tolist()}):
        assert torch.allclose(policy.act(observation, noise=NOISE), wanted, atol=1e-4)
    extra = {**seen(), "camera": np.zeros(3)}
    assert torch.equal(policy.act(extra, noise=NOISE), wanted)  # a key it does not know is left alone


def test_actions_are_physical_and_within_the_demonstrated_range():
    actions = make().act(seen(200), noise=torch.randn(200, T, A))
    assert (actions >= OFFSET - SPREAD - 1e-4).all()
    assert (actions <= OFFSET + SPREAD + 1e-4).all()
    assert (actions[..., 0].max() - actions[..., 0].min()) > 0.2 * SPREAD[0]


def test_an_untrained_policy_returns_its_noise_in_physical_units():
    """A zero velocity leaves x_0 where it is, so the chunk is the denormalised noise, clipped."""
    policy = make("flow_matching")
    torch.nn.init.zeros_(policy.network.output.weight)
    torch.nn.init.zeros_(policy.network.output.bias)
    wanted = OFFSET + SPREAD * NOISE.clamp(-1, 1)
    assert torch.allclose(policy.act(seen(), noise=NOISE), wanted, rtol=1e-5)


def test_observations_are_normalised_inside():
    """Other units of observation, with statistics to match, make the same policy."""
    policy, other = make(), make()
    observation = seen()["observation"]
    normalizer = other.observation_normalizers["observation"]
    normalizer.center.mul_(1000)
    normalizer.scale.mul_(1000)
    got = other.act(observation * 1000, noise=NOISE)
    assert torch.allclose(got, policy.act(observation, noise=NOISE), rtol=1e-4)
    assert not torch.allclose(policy.act(observation * 1000, noise=NOISE), got, rtol=1e-2)


def test_a_wider_action_clip_lets_actions_leave_the_demonstrated_range():
    policy = make("flow_matching", action_clip=1.5)
    torch.nn.init.zeros_(policy.network.output.weight)
    torch.nn.init.zeros_(policy.network.output.bias)
    actions = policy.act(seen(), noise=torch.full((B, T, A), 9.0))
    assert torch.allclose(actions, (OFFSET + 1.5 * SPREAD).expand(B, T, A))


def test_noise_and_generators_decide_the_sample():
    policy = make()
    first, second = (policy.act(seen(), generator=torch.Generator().manual_seed(1)) for _ in range(2))
    other = policy.act(seen(), generator=torch.Generator().manual_seed(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    drawn = torch.randn(B, T, A, generator=torch.Generator().manual_seed(1))
    assert torch.equal(policy.act(seen(), noise=drawn), first)


def test_rows_do_not_depend_on_their_batch():
    policy = make()
    whole = policy.act(seen(), noise=NOISE)
    single = policy.act({"observation": seen()["observation"][1:2]}, noise=NOISE[1:2])
    assert torch.allclose(single, whole[1:2], rtol=1e-5, atol=1e-4)


def test_the_number_of_steps_is_used():
    policy = make()
    assert policy.sampling.num_steps == 4
    samples = {k: policy.act(seen(), noise=NOISE, num_steps=k) for k in (1, 2, 4)}
    assert torch.equal(samples[4], policy.act(seen(), noise=NOISE))
    assert not torch.equal(samples[1], samples[2])
    assert [policy.nfe(), policy.nfe(2), policy.nfe(32, "heun")] == [4, 2, 64]


@pytest.mark.parametrize(
    ("objective", "arguments", "words"),
    [
        ("shortcut", {"num_steps": 3}, "powers of two"),
        ("shortcut", {"num_steps": 0}, "at least 1"),
        ("shortcut", {"num_steps": 4, "solver": "heun"}, "euler"),
        ("flow_matching", {"num_steps": 0}, "at least 1"),
        ("flow_matching", {"solver": "rk45"}, "midpoint"),
        ("regression", {"num_steps": 4}, "one step"),
        ("mip", {"num_steps": 1}, "two steps"),
    ],
)
def test_steps_the_policy_does_not_have_are_refused(objective, arguments, words):
    with pytest.raises(ConfigError, match=words):
        make(objective).act(seen(), **arguments)


def test_a_tuned_checkpoint_takes_other_steps_only_when_told(tmp_path):
    policy = make(tuned=SamplerSpec(num_steps=2, solver="euler"))
    policy = FlowPolicy.load(policy.save(tmp_path / "tuned"))
    assert policy.sampling.num_steps == 2
    assert torch.equal(policy.act(seen(), noise=NOISE), policy.act(seen(), noise=NOISE, num_steps=2))
    with pytest.raises(ConfigError, match=r"num_steps=2.*num_steps=4.*allow_any_steps=True"):
        policy.act(seen(), noise=NOISE, num_steps=4)
    with pytest.raises(ConfigError, match="solver=heun"):
        policy.act(seen(), noise=NOISE, num_steps=2, solver="heun")
    policy.act(seen(), noise=NOISE, num_steps=4, allow_any_steps=True)
    with pytest.raises(ConfigError, match="powers of two"):
        policy.act(seen(), noise=NOISE, num_steps=3, allow_any_steps=True)


def test_a_wrong_shape_of_noise_is_refused():
    with pytest.raises(FlowPolicyError, match=r"\(3, 4, 3\).*\(3, 4, 2\)"):
        make().act(seen(), noise=torch.zeros(B, T, A + 1))


@pytest.mark.parametrize(
    ("observation", "words"),
    [
        ({"state": torch.zeros(B, T_O, 5)}, "lacks 'observation'"),
        (torch.zeros(B, T_O, 6), r"\(3, 2, 6\).*2, 5"),
        (torch.zeros(B, 1, 5), r"\(3, 1, 5\)"),
        (torch.zeros(T_O, 5), r"\(2, 5\)"),
        (torch.full((B, T_O, 5), torch.nan), "NaN"),
        (torch.full((B, T_O, 5), torch.inf), "infinity"),
    ],
)
def test_observations_that_do_not_fit_are_refused(observation, words):
    with pytest.raises(FlowPolicyError, match=words):
        make().act(observation)


def test_saving_replaces_the_whole_folder(tmp_path):
    first, second = make(seed=0), make(seed=1)
    first.save(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "stale").write_text("from before")
    second.save(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint" / "stale").exists()
    loaded = FlowPolicy.load(tmp_path / "checkpoint")
    assert torch.equal(loaded.act(seen(), noise=NOISE), second.act(seen(), noise=NOISE))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_the_config_on_disk_is_plain_json_with_a_version(tmp_path):
    make().save(tmp_path / "checkpoint")
    content = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert content["format_version"] == 2
    assert content["objective"] == {"name": "shortcut"}
    assert content["observations"] == {"observation": {"kind": "vector", "shape": [5]}}


@pytest.mark.parametrize(
    "tuned",
    [
        SamplerSpec(num_steps=2, solver="euler"),
        SamplerSpec(num_steps=3, solver="heun", grid={"name": "shifted", "shift": 0.3}),
        SamplerSpec(num_steps=3, solver="ab122", grid={"name": "given", "times": (0, 0.5, 0.75, 1)}),
    ],
)
def test_the_sampling_that_a_policy_was_tuned_for_is_kept(tmp_path, tuned):
    policy = make("flow_matching", tuned=tuned)
    loaded = FlowPolicy.load(policy.save(tmp_path / "checkpoint"))
    assert loaded.config.tuned == loaded.sampling == tuned
    given = policy.act(seen(), noise=NOISE, sampler=dataclasses.replace(tuned))
    assert torch.equal(loaded.act(seen(), noise=NOISE), given)
    with pytest.raises(ConfigError, match="tuned for num_steps="):
        loaded.act(seen(), sampler=dataclasses.replace(tuned, grid={"name": "shifted", "shift": 0.9}))


@pytest.mark.parametrize(
    ("tuned", "words"),
    [
        ({"num_steps": 3, "solver": "ab1223"}, "of at most 3 steps"),
        ({"num_steps": 3, "solver": "elsewhere.json"}, "solver is 'elsewhere.json'"),
        ({"num_steps": 3, "grid": {"name": "given", "times": [0, 0.5, 1]}}, "of 3 steps"),
        ({"num_steps": 3, "grid": {"name": "shifted", "shfit": 0.5}}, "shfit"),
    ],
)
def test_a_checkpoint_whose_sampling_is_none_is_refused(tmp_path, tuned, words):
    file = make("flow_matching").save(tmp_path / "checkpoint") / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tuned": tuned}))
    with pytest.raises(CheckpointError, match=words):
        FlowPolicy.load(tmp_path / "checkpoint")


def test_a_checkpoint_of_format_1_names_the_two_by_themselves(tmp_path):
    file = make("flow_matching").save(tmp_path / "checkpoint") / "config.json"
    content = json.loads(file.read_text())
    del content["tuned"]
    del content["model"]["network"]
    old = {**content, "format_version": 1, "tuned_num_steps": 2, "tuned_solver": "heun"}
    file.write_text(json.dumps(old))
    assert FlowPolicy.load(tmp_path / "checkpoint").sampling == SamplerSpec(num_steps=2, solver="heun")
    file.write_text(json.dumps({**old, "tuned_num_steps": None}))
    assert FlowPolicy.load(tmp_path / "checkpoint").config.tuned is None


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """``huggingface_hub`` with a folder in the place of the network."""
    import shutil

    def create_repo(repo_id, private, exist_ok):
        calls.append(("create", repo_id, private))

    def upload_folder(repo_id, folder_path):
        shutil.copytree(folder_path, tmp_path / "hub" / repo_id)
        return f"https://hub.test/{repo_id}"

    def snapshot_download(repo_id, allow_patterns):
        calls.append(("download", repo_id, tuple(allow_patterns)))
        if not (tmp_path / "hub" / repo_id).is_dir():
            raise RuntimeError("404: a long page of the server's")
        return str(tmp_path / "hub" / repo_id)

    calls = []
    hub = types.ModuleType("huggingface_hub")
    hub.create_repo, hub.upload_folder, hub.snapshot_download = create_repo, upload_folder, snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return calls


def test_to_the_hub_and_back(fake_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    policy = make()
    assert policy.push_to_hub("someone/hopper") == "https://hub.test/someone/hopper"
    loaded = FlowPolicy.load("someone/hopper")
    assert torch.equal(loaded.act(seen(), noise=NOISE), policy.act(seen(), noise=NOISE))
    assert fake_hub[0] == ("create", "someone/hopper", True)  # private unless asked otherwise
    assert set(fake_hub[1][2]) == {"config.json", "model.safetensors"}  # nothing that could be code
    with pytest.raises(CheckpointError, match="someone/nothing") as refused:
        FlowPolicy.load("someone/nothing")
    assert "404" not in str(refused.value)


def test_without_the_hub_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"flowpolicy\[hub\]"):
        FlowPolicy.load("someone/hopper")
    with pytest.raises(CheckpointError, match=r"flowpolicy\[hub\]"):
        make().push_to_hub("someone/hopper")


def test_a_missing_folder_is_not_looked_for_on_the_hub(fake_hub, tmp_path):
    for path in (tmp_path / "nothing", "./a/b", "/nowhere/b", "a/b/c", "name"):
        with pytest.raises(CheckpointError, match="No checkpoint at"):
            FlowPolicy.load(path)
    assert fake_hub == []


KEYS = ["a.b", "a%2Eb", "type", "values", "train", "keys", "forward", "noise", "key0", "eye in hand"]


def of_shapes(shapes, **changes):
    policy = FlowPolicy(dataclasses.replace(make().config, observations=shapes, **changes)).eval()
    observation = {key: 5 + torch.randn(50, *shape) for key, shape in shapes.items()}
    policy.fit_normalizers(observation, torch.randn(50, A))
    return policy, {key: value[: B * T_O].unflatten(0, (B, T_O)) for key, value in observation.items()}


@pytest.mark.parametrize("with_images", [False, True])
def test_observations_may_have_any_name(tmp_path, with_images):
    shapes = dict.fromkeys(KEYS, (2,))
    policy, observation = of_shapes(shapes)
    if with_images:
        shapes |= {f"{key}.image": (36, 36, 3) for key in KEYS[:2]} | {"half": (36, 36, 1)}
        policy = FlowPolicy(dataclasses.replace(policy.config, observations=shapes)).eval()
        images = {k: torch.randint(256, (B, T_O, *s)).byte() for k, s in shapes.items() if k not in KEYS}
        observation |= images
    loaded = FlowPolicy.load(policy.save(tmp_path / "checkpoint"))
    assert torch.equal(loaded.act(observation, noise=NOISE), policy.act(observation, noise=NOISE))


def test_a_single_number_is_an_observation_as_a_vector_of_one_is():
    policy, observation = of_shapes({"gripper": (), "pose": (3,)})
    twin = FlowPolicy(dataclasses.replace(policy.config, observations={"gripper": (1,), "pose": (3,)}))
    state = policy.state_dict()
    for name in ("center", "scale"):
        state[f"observation_normalizers.gripper.{name}"].unsqueeze_(0)
    twin.load_state_dict(state)
    wanted = policy.act(observation, noise=NOISE)
    observation["gripper"] = observation["gripper"][..., None]
    assert torch.equal(twin.eval().act(observation, noise=NOISE), wanted)


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({"": (3,)}, "observation's key"),
        ({"task": ()}, "one-hot"),
        ({"task": (8, 8, 3)}, "one-hot"),
        ({"x": (4, 4)}, "'x'"),
    ],
)
def test_observations_that_no_network_takes_are_refused(shapes, reason):
    with pytest.raises(ConfigError, match=reason):
        of_shapes(shapes)


@pytest.mark.parametrize("clip", [float("nan"), -1.0, 0.0, 1e308, float("inf"), 1e7])
def test_an_action_clip_that_is_no_bound_is_refused(clip):
    with pytest.raises(ConfigError, match="action_clip"):
        make(action_clip=clip)


@pytest.mark.parametrize("mode", ["minmax", "gaussian", "quantile"])
@pytest.mark.parametrize("clip", [1.0, 5.0])
def test_the_rare_values_of_a_gripper_can_be_given_back(mode, clip):
    rows = torch.arange(2000)
    action = torch.stack(
        [torch.where(rows % 200 == 0, -1.0, 1.0), torch.where(rows % 150 == 7, 1.57, 1e-4)], 1
    )
    policy = make(action_normalization=mode, action_clip=clip)
    policy.fit_normalizers({"observation": torch.randn(2000, 5)}, action)
    assert torch.allclose(policy.finish(policy.action_normalizer.normalize(action)), action, atol=1e-4)
    assert policy.lost_actions(action) == 0.0


def test_statistics_follow_a_state_dict_into_another_policy():
    policy, other = make(), make(seed=1)
    other.fit_normalizers({"observation": torch.randn(9, 5)}, torch.rand(9, A))
    other.load_state_dict(policy.state_dict())
    assert torch.equal(other.act(seen(), noise=NOISE), policy.act(seen(), noise=NOISE))


def test_another_config_changes_all_that_follows_from_it():
    policy = make()
    tuned = SamplerSpec(num_steps=2, solver="euler")
    policy.config = dataclasses.replace(policy.config, execute_horizon=1, metadata={"seed": 7}, tuned=tuned)
    assert (policy.spec.execute_horizon, policy.spec.metadata) == (1, {"seed": 7})
    assert (policy.sampling.num_steps, policy.nfe()) == (2, 2)
