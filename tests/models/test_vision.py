"""Image encoders: cost, crop, keypoints, and that images are encoded once."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flowpolicy.acceleration.sampler import build_sampler
from flowpolicy.errors import ConfigError, FlowPolicyError
from flowpolicy.features import features_of
from flowpolicy.features.vision.config import BACKBONES, VisionConfig
from flowpolicy.features.vision.encoder import ImageEncoder
from flowpolicy.models.config import MLPConfig, TransformerConfig
from flowpolicy.models.transformer import VelocityTransformer
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.config import PolicyConfig
from flowpolicy.spec import PolicySpec

T_O = 2


def images(rows=3, size=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (rows, T_O, size, size, 3), generator=generator, dtype=torch.uint8)


def encoder(size=48, **settings):
    torch.manual_seed(0)
    return ImageEncoder((size, size, 3), T_O, 16, VisionConfig(**settings)).eval()


def image_policy(network=TransformerConfig, **settings):
    """Two cameras, a state and a task token; random weights, since a fresh network is the zero velocity."""
    torch.manual_seed(0)
    shapes = {"front": (48, 48, 3), "wrist": (40, 48, 3), "observation": (3,), "task": (2,)}
    sizes = {"hidden": 24} if network is MLPConfig else {"num_heads": 2}
    model = network(width=16, depth=1, vision=VisionConfig(**settings), **sizes)
    policy = FlowPolicy(PolicyConfig({"name": "flow_matching"}, model, shapes, 2, T_O, 4, 2)).eval()
    with torch.no_grad():
        for parameter in policy.network.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.3)
    policy.fit_normalizers({"observation": torch.randn(9, 3), "task": torch.eye(2)}, 2 * torch.randn(9, 2))
    return policy


def observations(rows=2):
    generator = torch.Generator().manual_seed(1)
    tasks = torch.eye(2)[torch.randint(2, (rows,), generator=generator)]
    return {
        "front": images(rows),
        "wrist": images(rows)[:, :, :40],
        "observation": torch.randn(rows, T_O, 3, generator=generator),
        "task": tasks[:, None].expand(-1, T_O, -1),
    }


@pytest.mark.parametrize("size", [84, 96])
def test_the_default_encoder_costs_at_most_30_mflop_an_image(size):
    camera = ImageEncoder((size, size, 3), 1, 256, VisionConfig()).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        camera(torch.zeros(1, 1, size, size, 3, dtype=torch.uint8))
    assert 5e6 < counter.get_total_flops() <= 30e6


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_parameter_of_a_backbone_learns_from_every_token(backbone):
    camera = encoder(backbone=backbone)
    tokens = camera(images())
    assert tokens.shape == (3, camera.num_tokens, 16)
    (tokens * torch.randn_like(tokens)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in camera.parameters())


def test_outside_training_the_central_window_is_seen():
    camera = encoder(crop=0.75)
    picture, changed = images(), images()
    changed[:, :, :6] = 0
    changed[:, :, :, -6:] = 255
    assert torch.equal(camera(picture), camera(changed))
    changed[:, :, 6] = 0
    assert not torch.equal(camera(picture), camera(changed))


def test_in_training_the_window_moves_and_is_the_same_over_a_history():
    camera = encoder(crop=0.75).train()
    rows, columns = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
    places = torch.stack([rows, columns, rows], -1).to(torch.uint8).expand(64, T_O, -1, -1, -1)
    windows = camera._cropped(places)
    assert windows.shape == (64, T_O, 36, 36, 3)
    assert torch.equal(windows[:, 0], windows[:, 1])
    corners = {tuple(corner) for corner in windows[:, 0, 0, 0, :2].tolist()}
    assert len(corners) > 30  # of 64 windows, in 13 x 13 places
    assert {top for top, _ in corners} | {left for _, left in corners} == set(range(13))
    steps = windows[:, 0].int()
    assert ((steps[:, 1:, :, 0] - steps[:, :-1, :, 0]) == 1).all()
    assert ((steps[:, :, 1:, 1] - steps[:, :, :-1, 1]) == 1).all()


def test_a_keypoint_is_the_place_where_its_map_is_hot():
    camera = encoder(crop=1.0, keypoints=1)
    seen = []
    camera.place.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    rows, columns = 6, 6  # one eighth of 48
    grid = torch.zeros(T_O, 64, rows, columns)
    grid[:, :, 1, 4] = 100.0
    camera.backbone.forward = lambda pixels: grid
    torch.nn.init.ones_(camera.heat.weight)
    camera(images(1))
    expected = torch.tensor([4 / 2.5 - 1, 1 / 2.5 - 1]).expand(T_O, 2)
    torch.testing.assert_close(seen[0], expected)


def test_a_camera_too_coarse_is_refused():
    with pytest.raises(ConfigError, match="too small"):
        encoder(size=32, crop=0.9)


@pytest.mark.parametrize(
    ("backend", "network"), [("eager", TransformerConfig), ("eager", MLPConfig), ("compile", MLPConfig)]
)
def test_a_sampler_computes_what_the_policy_does_and_encodes_images_once(backend, network):
    policy, observation = image_policy(network), observations()
    noise = torch.randn(2, 4, 2)
    calls = []
    for camera in policy.network.encoder.cameras.values():
        camera.register_forward_hook(lambda *_: calls.append(1))
    chunk = policy.act(observation, num_steps=2, noise=noise)
    assert len(calls) == 2  # one for each camera, whatever K is
    sampler = build_sampler(policy, batch_size=2, num_steps=2, backend=backend)
    torch.testing.assert_close(sampler(observation, noise), chunk, rtol=0, atol=1e-4)
    other = {**observation, "wrist": 255 - observation["wrist"]}
    assert not torch.allclose(sampler(other, noise), chunk, atol=1e-3)


def test_images_that_are_encoded_already_give_the_same_context():
    policy, observation = image_policy(), observations()
    normalized = policy.normalize_observations(observation)
    seen = policy.network.encode_images(normalized)
    assert seen["front"].shape[1:] == (policy.network.encoder.cameras["front"].num_tokens, 16)
    for given, wanted in zip(policy.network.encode(seen), policy.network.encode(normalized), strict=True):
        assert torch.equal(given.key, wanted.key)
        assert torch.equal(given.value, wanted.value)


def test_every_kind_of_observation_reaches_the_velocity():
    policy, observation = image_policy(), observations()
    noise = torch.randn(2, 4, 2)
    chunk = policy.act(observation, num_steps=2, noise=noise)
    for key, value in observation.items():
        moved = 255 - value if value.dtype == torch.uint8 else value.flip(-1)
        assert not torch.allclose(policy.act({**observation, key: moved}, num_steps=2, noise=noise), chunk)


def test_a_task_has_a_token_of_its_own():
    shapes = {"observation": (3,), "task": (4,)}
    config = TransformerConfig(width=16, depth=1, num_heads=2, tokens_per_step=2)
    network = VelocityTransformer(config, PolicySpec(features_of(shapes), T_O, 4, 1, 2))
    seen = {"observation": torch.zeros(1, T_O, 3), "task": torch.eye(4)[:1, None].expand(-1, T_O, -1)}
    tokens = network.encoder(seen)
    assert tokens.shape == (1, 2 * T_O + 1, 16)
    changed = network.encoder({**seen, "task": torch.eye(4)[2:3, None].expand(-1, T_O, -1)})
    assert [bool((a != b).any()) for a, b in zip(tokens[0], changed[0], strict=True)] == [False] * 4 + [True]


def test_images_are_uint8_or_refused():
    policy, observation = image_policy(), observations()
    with pytest.raises(FlowPolicyError, match=r"'front' is an image of torch\.float32; give uint8"):
        policy.act({**observation, "front": observation["front"] / 255})


def test_a_saved_image_policy_is_the_same(tmp_path):
    policy, observation = image_policy(), observations()
    noise = torch.randn(2, 4, 2)
    loaded = FlowPolicy.load(policy.save(tmp_path / "checkpoint"))
    assert loaded.config == policy.config
    assert torch.equal(loaded.act(observation, noise=noise), policy.act(observation, noise=noise))
