"""A checkpoint broken in any way, or an observation of a wrong kind, is refused in one sentence."""

from __future__ import annotations

import errno
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flowpolicy.errors import FlowPolicyError
from flowpolicy.models.config import TransformerConfig
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.config import PolicyConfig

Break = Callable[[Path, np.random.Generator], None]
CASES: dict[str, tuple[Break, int]] = {}


def case(name: str, repeats: int = 1) -> Callable[[Break], Break]:
    def enter(function: Break) -> Break:
        CASES[name] = (function, repeats)
        return function

    return enter


def make_policy() -> FlowPolicy:
    torch.manual_seed(0)
    config = PolicyConfig(
        objective={"name": "shortcut"},
        model=TransformerConfig(width=16, depth=1, num_heads=2),
        observations={"observation": (3,)},
        action_dim=2,
        obs_horizon=1,
        action_horizon=4,
        execute_horizon=4,
    )
    policy = FlowPolicy(config)
    policy.fit_normalizers({"observation": torch.randn(50, 3)}, torch.rand(50, 2))
    return policy


def assert_one_sentence(sentence: str, *mentions: str) -> None:
    assert "\n" not in sentence
    assert sentence[-1] in ".?", sentence
    assert not re.search(r"[.!?] [A-Z]", sentence), sentence
    assert 20 < len(sentence) < 500, sentence
    assert any(mention in sentence for mention in mentions), (mentions, sentence)


def _config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def _tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@case("nothing there")
def _(folder: Path, rng: np.random.Generator) -> None:
    folder.rename(folder.with_name("elsewhere"))


@case("a file instead of a folder")
def _(folder: Path, rng: np.random.Generator) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.write_text("x")


@case("no config.json")
def _(folder: Path, rng: np.random.Generator) -> None:
    (folder / "config.json").unlink()


@case("no weights")
def _(folder: Path, rng: np.random.Generator) -> None:
    (folder / "model.safetensors").unlink()


@case("truncated config.json", repeats=5)
def _(folder: Path, rng: np.random.Generator) -> None:
    text = (folder / "config.json").read_text().rstrip()
    (folder / "config.json").write_text(text[: int(rng.integers(len(text)))])


@case("binary config.json")
def _(folder: Path, rng: np.random.Generator) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe" + rng.bytes(200))


@case("truncated weights", repeats=6)
def _(folder: Path, rng: np.random.Generator) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: int(rng.integers(len(content)))])


@case("random weights file", repeats=3)
def _(folder: Path, rng: np.random.Generator) -> None:
    (folder / "model.safetensors").write_bytes(rng.bytes(int(rng.integers(1, 4000))))


@case("a pickle in place of the weights")
def _(folder: Path, rng: np.random.Generator) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps({"network": 1}))


@case("a missing tensor", repeats=3)
def _(folder: Path, rng: np.random.Generator) -> None:
    _tensors(folder, lambda tensors: tensors.pop(sorted(tensors)[int(rng.integers(len(tensors)))]))


@case("a tensor too many")
def _(folder: Path, rng: np.random.Generator) -> None:
    _tensors(folder, lambda tensors: tensors.update(extra=torch.zeros(3)))


@case("a tensor of another shape", repeats=3)
def _(folder: Path, rng: np.random.Generator) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = sorted(tensors)[int(rng.integers(len(tensors)))]
        tensors[name] = torch.zeros(*tensors[name].shape, 2)

    _tensors(folder, change)


@case("NaN in the weights", repeats=3)
def _(folder: Path, rng: np.random.Generator) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        names = [
            name for name in sorted(tensors) if tensors[name].is_floating_point() and tensors[name].numel()
        ]
        tensors[names[int(rng.integers(len(names)))]].view(-1)[0] = float("nan")

    _tensors(folder, change)


for _name, _changes in {
    "config of a newer format": {"format_version": 99},
    "config without a format": {"format_version": ...},
    "config with a format in words": {"format_version": "one"},
    "config with an unknown key": {"action_dimension": 2},
    "config without a key": {"action_dim": ...},
    "config without shapes": {"observations": ...},
    "config of other observations": {"observations": {"observation": {"kind": "vector", "shape": [5]}}},
    "config of other keys": {"observations": {"state": {"kind": "vector", "shape": [3]}}},
    "config with shapes in words": {"observations": {"observation": {"kind": "vector", "shape": ["three"]}}},
    "config with shapes that are none": {"observations": {"observation": {"kind": "vector", "shape": 3}}},
    "config with observations that are none": {"observations": 3},
    "config with a kind that is none": {"observations": {"observation": {"kind": "scent", "shape": [3]}}},
    "config without a kind": {"observations": {"observation": {"shape": [3]}}},
    "config with a setting no kind has": {
        "observations": {"observation": {"kind": "vector", "shape": [3], "unit": "m"}}
    },
    "config of both formats": {"observation_shapes": {"observation": [3]}},
    "config of other actions": {"action_dim": 7},
    "config with negative actions": {"action_dim": -2},
    "config without actions": {"action_dim": 0},
    "config with actions in words": {"action_dim": "two"},
    "config without a chunk": {"action_horizon": 0},
    "config of an unknown objective": {"objective": {"name": "diffusion"}},
    "config of an objective without a name": {"objective": {}},
    "config of an objective with an unknown setting": {"objective": {"name": "shortcut", "stride": 3}},
    "config of an unknown normalisation": {"observation_normalization": "log"},
    "config of another width": {"model": {"width": 32, "depth": 1, "num_heads": 2}},
    "config of an impossible width": {"model": {"width": 15, "depth": 1, "num_heads": 2}},
    "config of more layers": {"model": {"width": 16, "depth": 2, "num_heads": 2}},
    "config with an unknown model setting": {"model": {"widht": 16}},
    "config without observations": {"observations": {}},
}.items():
    CASES[_name] = (lambda folder, rng, changes=_changes: _config(folder, **changes), 1)  # type: ignore[misc]
for _name, _content in {
    "a JSON list": "[]",
    "a JSON number": "3",
    "an empty object": "{}",
    "nothing": "",
}.items():
    CASES[f"config of {_name}"] = (
        lambda folder, rng, content=_content: (folder / "config.json").write_text(content) and None,  # type: ignore[misc]
        1,
    )

RUNS = [(name, i) for name, (_, repeats) in CASES.items() for i in range(repeats)]


@pytest.mark.parametrize(("name", "seed"), RUNS, ids=[f"{name}-{i}" for name, i in RUNS])
def test_broken_checkpoint(name: str, seed: int, tmp_path: Path):
    folder = make_policy().save(tmp_path / "checkpoint")
    FlowPolicy.load(folder)
    CASES[name][0](folder, np.random.default_rng([seed, len(name)]))
    with pytest.raises(FlowPolicyError) as refusal:
        FlowPolicy.load(folder)
    assert_one_sentence(str(refusal.value), str(folder))


@pytest.mark.parametrize(
    ("observations", "settings", "mention"),
    [
        ({"state": np.zeros((1, 1, 3))}, {}, "observation"),
        (np.zeros((1, 1, 4)), {}, "observation"),
        (np.zeros((1, 2, 3)), {}, "observation"),
        (np.zeros(3), {}, "observation"),
        (np.full((1, 1, 3), np.nan), {}, "observation"),
        (np.full((1, 1, 3), np.inf), {}, "observation"),
        (np.array([[["a", "b", "c"]]]), {}, "observation"),
        (np.zeros((1, 1, 3)), {"num_steps": 3}, "3"),
        (np.zeros((1, 1, 3)), {"num_steps": 0}, "0"),
        (np.zeros((1, 1, 3)), {"num_steps": -4}, "-4"),
        (np.zeros((1, 1, 3)), {"solver": "rk45"}, "rk45"),
        (np.zeros((1, 1, 3)), {"noise": torch.zeros(1, 4, 3)}, "noise"),
    ],
)
def test_bad_requests_of_act(observations: Any, settings: dict[str, Any], mention: str):
    with pytest.raises(FlowPolicyError) as refusal:
        make_policy().act(observations, **settings)
    assert_one_sentence(str(refusal.value), mention)


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch):
    folder = make_policy().save(tmp_path / "checkpoint")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("flowpolicy.files.storage.save_file", full)
    with pytest.raises(FlowPolicyError) as refusal:
        make_policy().save(folder)
    assert_one_sentence(str(refusal.value), "disk is full")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]
