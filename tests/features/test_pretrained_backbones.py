"""Backbones of timm: weights from a file, the model's own normalisation, checkpoints without the file."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kinds import T_O, A, T
from safetensors.torch import save_file
from torch import nn

from flowpolicy.acceleration.sampler import build_sampler
from flowpolicy.errors import ConfigError
from flowpolicy.features import Image
from flowpolicy.features.vision.config import VisionConfig
from flowpolicy.features.vision.pretrained import TimmBackbone, load_pretrained
from flowpolicy.models.config import TransformerConfig
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.config import PolicyConfig

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


class Fake(nn.Module):
    """Looks like a convolutional model of timm with batch statistics, or a transformer with a class token."""

    def __init__(self, tokens, in_chans, img_size=(32, 32)):
        super().__init__()
        self.pretrained_cfg = {"mean": MEAN, "std": STD}
        self.conv, self.norm, self.tokens = nn.Conv2d(in_chans, 8, 8, 8), nn.BatchNorm2d(8), tokens
        if tokens:
            rows, columns = (side // 8 for side in img_size)
            self.patch_embed = SimpleNamespace(grid_size=(rows, columns), patch_size=(8, 8))
            self.num_prefix_tokens, self.sides = 1, (8 * rows, 8 * columns)

    def forward_features(self, x):
        self.seen = x
        assert not self.tokens or x.shape[2:] == self.sides
        grid = self.norm(self.conv(x))
        tokens = grid.flatten(2).transpose(1, 2)
        return torch.cat([tokens[:, :1], tokens], 1) if self.tokens else grid


@pytest.fixture
def timm(monkeypatch):
    """A package of that name, which keeps what it is asked for."""

    def create_model(
        name, pretrained=False, pretrained_cfg_overlay=None, num_classes=1000, in_chans=3, **sizes
    ):
        package.asked.append((name, pretrained))
        if name == "grid" and sizes:
            raise TypeError("unexpected keyword 'img_size'")
        if name not in ("grid", "tokens"):
            raise RuntimeError(f"Unknown model ({name})")
        model = Fake(name == "tokens", in_chans, **sizes)
        if pretrained:
            model.load_state_dict(pretrained_cfg_overlay["state_dict"])
        return model

    package = SimpleNamespace(create_model=create_model, asked=[])
    monkeypatch.setitem(sys.modules, "timm", package)
    return package


def policy_of(**vision):
    model = TransformerConfig(width=16, depth=1, num_heads=2, vision=VisionConfig(crop=1.0, **vision))
    return FlowPolicy(
        PolicyConfig({"name": "flow_matching"}, model, {"front": Image((32, 32, 3))}, A, T_O, T, 2)
    )


def act(policy, noise):
    return policy.act({"front": images()}, noise=noise)


def images(rows=2):
    return np.random.default_rng(0).integers(0, 256, (rows, T_O, 32, 32, 3), np.uint8)


def backbone_of(policy):
    return next(module for module in policy.network.modules() if isinstance(module, TimmBackbone))


@pytest.mark.parametrize("name", ["grid", "tokens"])
def test_it_begins_with_the_weights_of_a_file_and_reloads_without(name, timm, tmp_path):
    torch.manual_seed(1)
    wanted = Fake(name == "tokens", 3)
    wanted.norm.running_mean += 1
    file = tmp_path / "model.safetensors"
    save_file(wanted.state_dict(), file)
    policy = policy_of(backbone=f"timm:{name}", weights=str(tmp_path))
    load_pretrained(policy.network)
    for key, value in wanted.state_dict().items():
        assert torch.equal(backbone_of(policy).model.state_dict()[key], value)
    policy.save(tmp_path / "checkpoint")
    file.unlink()
    timm.asked.clear()
    noise = torch.randn(2, T, A)
    loaded = FlowPolicy.load(tmp_path / "checkpoint")
    assert torch.equal(act(loaded, noise), act(policy.eval(), noise))
    assert not any(pretrained for _, pretrained in timm.asked)
    sampled = build_sampler(loaded, num_steps=2).act({"front": images()}, noise=noise)
    assert torch.allclose(sampled, loaded.act({"front": images()}, noise=noise, num_steps=2), atol=1e-5)


def test_images_are_normalised_as_the_model_was_trained(timm):
    policy = policy_of(backbone="timm:grid").eval()
    policy.act({"front": images()})
    expected = (images() / 255.0 - MEAN) / STD
    seen = backbone_of(policy).model.seen.permute(0, 2, 3, 1).reshape(expected.shape)
    np.testing.assert_allclose(seen, expected, atol=1e-5)


def test_a_transformer_sees_whole_patches(timm):
    backbone = TimmBackbone(3, (36, 50), VisionConfig(backbone="timm:tokens"))
    assert backbone(torch.zeros(2, 3, 36, 50)).shape == (2, 8, 5, 7)
    assert not backbone.model.seen[:, :, 36:].any()
    assert backbone.model.seen[:, :, :36, :50].any()


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_or_trained_batches_change_no_statistics(frozen, timm):
    policy = policy_of(backbone="timm:grid", frozen=frozen)
    backbone = backbone_of(policy)
    policy.network.train()
    policy.network.requires_grad_(True)  # as fine-tuning does
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    policy.network.encoder({"front": torch.as_tensor(images())}).square().sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert (backbone.model.conv.weight.grad is None) == frozen
    assert policy.network.encoder.cameras["front"].project.weight.grad is not None


@pytest.mark.parametrize(("vision", "told"), [
    ({"backbone": "timm:none"}, r"backbone=timm:none cannot be made \(Unknown model"),
    ({"backbone": "timm:hf-hub:someone/model"}, r"one of convnet.*timm:NAME"),
    ({"backbone": "vit", "weights": "x"}, r"model\.vision\.weights is 'x'.*timm:NAME"),
    ({"backbone": "timm:grid", "weights": "nowhere.pt"}, r"no file nowhere\.pt; give a file"),
])  # fmt: skip
def test_what_cannot_be_had_is_one_sentence(vision, told, timm):
    with pytest.raises(ConfigError, match=told):
        load_pretrained(policy_of(**vision).network)


def test_a_pickle_runs_no_code(timm, tmp_path):
    torch.save({"state_dict": {"x": print}}, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=r"weights\.pt cannot be read"):
        load_pretrained(policy_of(backbone="timm:grid", weights=str(tmp_path / "weights.pt")).network)


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"backbone=timm:resnet18 needs .*flowpolicy\[vision\]"):
        policy_of(backbone="timm:resnet18")


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_models_of_timm(name, tmp_path):
    timm = pytest.importorskip("timm")
    source = timm.create_model(name, num_classes=10)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    policy = policy_of(backbone=f"timm:{name}", weights=str(tmp_path / "weights.pt"))
    load_pretrained(policy.network)
    ours, theirs = backbone_of(policy).model.state_dict(), source.state_dict()
    same = [
        torch.equal(value, theirs[key]) for key, value in ours.items() if value.shape == theirs[key].shape
    ]
    assert all(same)
    assert len(same) >= len(ours) - 1  # but for positions of another size
    loaded = FlowPolicy.load(policy.save(tmp_path / "checkpoint"))
    noise = torch.randn(2, T, A)
    assert torch.equal(act(loaded, noise), act(policy.eval(), noise))
