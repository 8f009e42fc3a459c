"""Small files and tensors of strangers: bounded, plain, and compared before anything is built."""

from __future__ import annotations

import json
import os
import resource
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowpolicy import FlowPolicy, PolicyConfig
from flowpolicy.errors import CheckpointError, ConfigError, FlowPolicyError
from flowpolicy.files.reading import MOST_JSON, parse_json, read_json, shapes_of, stored_tensors
from flowpolicy.flow.sampler_spec import MOST_STEPS
from flowpolicy.models.config import TransformerConfig


def make_policy(**changes: Any) -> FlowPolicy:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "objective": {"name": "flow_matching"}, "model": TransformerConfig(width=16, depth=1, num_heads=2),
        "observations": {"observation": (3,)}, "action_dim": 2, "obs_horizon": 1, "action_horizon": 4,
        "execute_horizon": 4,
    }  # fmt: skip
    return FlowPolicy(PolicyConfig(**{**settings, **changes}))


def declared(shapes: dict[str, list[Any]], kind: str = "vector") -> dict[str, Any]:
    return {key: {"kind": kind, "shape": shape} for key, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_policy().save(tmp_path / "checkpoint")


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text())
    for dotted, value in changes.items():
        *groups, key = dotted.split("__")
        node = content
        for group in groups:
            node = node[group]
        node[key] = value
    file.write_text(json.dumps(content))


def refusal(call: Callable[[], Any]) -> str:
    """The one sentence with which a call is refused, soon."""
    started = time.perf_counter()
    with pytest.raises(FlowPolicyError) as refused:
        call()
    sentence = str(refused.value)
    assert sentence.isprintable()
    assert sentence.endswith(".")
    assert len(sentence) < 600
    assert time.perf_counter() - started < 5
    return sentence


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nests more than 32"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "nests more than 32"),
        (b'{"a": ' * 40 + b"1" + b"}" * 40, "nests more than 32"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "no number"),
        (b'{"a": 1e999}', "holds inf"),
        (b'{"a": 1' + b"0" * 30 + b"}", "holds 1"),
        (b'{"a": 1' + b"0" * 9999 + b"}", "not readable JSON"),
        (b'{"a": 1, "a": 2}', "a key comes twice"),
        (b'{"a": "\\ud800"}', "holds"),
        (b'{"a": "\\u0000"}', "holds"),
        (b'{"a": "\\u001b[31m"}', "holds"),
        (b'{"two\\nlines": 1}', "the name"),
        (b'{"a": [' + b"[]," * 300_000 + b"1]}", "more than 200,000 values"),
        (b'{"a": "\xff"}', "not readable JSON"),
        (b"[1]", "a list in place of settings"),
        (b"", "not readable JSON"),
    ],
    ids=range(17),
)
def test_what_no_file_of_ours_holds_is_refused(text: bytes, words: str):
    assert words in refusal(lambda: parse_json(text, "a.json"))


def test_text_numbers_and_lists_are_read_as_they_are(tmp_path: Path):
    content = {"a": [1, 2.5, None, True, "ä\n"], "b": {"c": []}}
    (tmp_path / "a.json").write_text(json.dumps(content))
    (tmp_path / "link.json").symlink_to(tmp_path / "a.json")  # as the Hub's cache keeps its files
    assert read_json(tmp_path / "link.json") == content


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(4 << 30)


ODD: dict[str, Callable[[Path], Any]] = {
    "a pipe": _pipe,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "memory": lambda path: path.symlink_to("/proc/self/mem"),
    "a folder": lambda path: path.mkdir(),
    "a link to itself": lambda path: path.symlink_to(path),
    "4 GB": _huge,
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="devices of Linux")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("odd", ODD)
def test_a_file_that_is_none_is_refused_at_once(folder: Path, name: str, odd: str):
    (folder / name).unlink()
    ODD[odd](folder / name)
    assert str(folder) in refusal(lambda: FlowPolicy.load(folder))


def test_a_large_description_of_a_small_file_costs_nothing(folder: Path):
    change_config(folder, model__width=8192, model__depth=128, model__feedforward_ratio=16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "does not fit its config.json" in refusal(lambda: FlowPolicy.load(folder))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB; it would be 1 TB


def test_shapes_are_those_of_the_module_that_is_built():
    images = make_policy(observations={"image": (40, 48, 3), "state": (2,), "task": (4,)})
    assert shapes_of(
        lambda: make_policy(observations={"image": (40, 48, 3), "state": (2,), "task": (4,)})
    ) == {name: tuple(tensor.shape) for name, tensor in images.state_dict().items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"action_clip": float("nan")},
        {"action_clip": -1},
        {"action_clip": 0},
        {"action_clip": 1e308},
        {"action_clip": True},
        {"execute_horizon": 0},
        {"execute_horizon": -3},
        {"execute_horizon": 100},
        {"execute_horizon": 2.0},
        {"objective__default_num_steps": 10**9},
        {"objective__default_num_steps": 0},
        {"objective__time_sampling": {"name": "u_shaped", "a": 1e6}},
        {"objective__name": ["flow_matching"]},
        {"tuned_num_steps": 10**9},
        {"tuned_num_steps": -1},
        {"tuned_solver": "rk45"},
        {"model__width": 2**40},
        {"model__depth": 10**9},
        {"model__dropout": "nan"},
        {"model__vision": {"channels": 16 * 10**6}},
        {"model__vision": 3},
        {"observations": declared({"": [3]})},
        {"observations": declared({"x" * 300: [3]})},
        {"observations": declared({f"key{number}": [1] for number in range(1000)})},
        {"observations": declared({"observation": [10**12]})},
        {"observations": declared({"observation": [-3]})},
        {"observations": declared({"observation": [True]})},
        {"observations": declared({"image": [40_000, 40_000, 3]}, "image")},
        {"action_horizon": 10**9},
        {"obs_horizon": 10**9},
        {"task": {"name": "two $\\frac$ words: ../x"}},
        {"task": {"name": {}}},
        {"task": 3},
        {"metadata": []},
        {"format_version": True},
        {"format_version": 0},
        {"x" * 100_000: 1},
        {"action_dim": "x" * 100_000},
    ],
    ids=lambda changes: f"{next(iter(changes))[:30]}-{next(iter(changes.values()))!r:.30}",
)
def test_a_config_out_of_range_is_refused(folder: Path, changes: dict[str, Any]):
    change_config(folder, **changes)
    assert str(folder) in refusal(lambda: FlowPolicy.load(folder))


def test_no_chunk_takes_more_steps_than_a_policy_needs():
    policy = make_policy()
    for steps in (0, MOST_STEPS + 1, 10**9):
        with pytest.raises(ConfigError, match="num_steps"):
            policy.act(torch.zeros(1, 1, 3), num_steps=steps)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def _set(name: str, value: float, dtype: torch.dtype = torch.float32) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.full(tensors[name].shape, value, dtype=dtype)

    return change


WEIGHT, SCALE = "network.output.weight", "action_normalizer.scale"
OBSERVATION = "observation_normalizers.observation"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set(WEIGHT, 1e300, torch.float64), "beyond float32"),
        (_set(WEIGHT, float("nan")), "NaN"),
        (_set(WEIGHT, 1, torch.int64), "I64"),
        (_set(WEIGHT, 1, torch.bool), "BOOL"),
        (_set(SCALE, -1), "negative"),
        (_set(f"{OBSERVATION}.scale", 3e38), "too large"),
        (_set("action_normalizer.center", 3.4e38), None),
        (_set(f"{OBSERVATION}.scale", 1e-42), None),  # too small to divide by: constant
    ],
)
def test_tensors_that_cannot_be_used_are_refused(folder: Path, change: Any, words: str | None):
    rewrite(folder, change)
    if words is None:  # odd, but every action is a number still
        assert torch.isfinite(FlowPolicy.load(folder).act(torch.zeros(1, 1, 3))).all()
    else:
        assert words in refusal(lambda: FlowPolicy.load(folder))


def test_an_answer_that_is_not_finite_is_refused(folder: Path):
    rewrite(folder, _set("network.embed_time.0.weight", 3e38))
    rewrite(folder, _set("network.embed_time.2.weight", 3e38))
    rewrite(folder, _set("network.modulate_output.weight", 1.0))
    rewrite(folder, _set(WEIGHT, 1.0))
    policy = FlowPolicy.load(folder)
    assert "NaN or infinity" in refusal(lambda: policy.act(torch.zeros(1, 1, 3)))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": 3, "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [1] * 100, "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 16]},
        {"dtype": "F32"},
        7,
    ],
)
def test_a_header_that_promises_what_is_not_there_is_refused(tmp_path: Path, entry: Any):
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        stored_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("size", [0, 1, 2**40, 2**64 - 1])
def test_a_header_of_an_impossible_size_is_refused(tmp_path: Path, size: int):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", size) + b"{}" + bytes(8))
    with pytest.raises(CheckpointError, match="holds no tensors"):
        stored_tensors(tmp_path / "a.safetensors")
    assert MOST_JSON < 2**40


@pytest.mark.parametrize(
    ("steps", "demo"), [({}, {}), ([1], "x"), ("three", None), (10**18, True), (None, 10**18), (-5, 2.5)]
)
def test_what_a_checkpoint_notes_of_itself_may_be_anything(steps: Any, demo: Any):
    from flowpolicy.evaluation.sweep import _number

    for noted in (steps, demo):
        number = _number(noted)
        assert number is None or abs(number) < 1e15
