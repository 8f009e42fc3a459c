"""A task whose simulator is not installed says in one sentence which extra brings it."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from flowpolicy.data.image_codecs import image_codec
from flowpolicy.errors import DataError, TaskError
from flowpolicy.evaluation.task import task_from

pytest.importorskip("gymnasium")


def task_of(env: str) -> Any:
    with initialize_config_module("flowpolicy_configs", version_base="1.3"):
        return task_from(OmegaConf.to_container(compose("pretrain", [f"env={env}"]).env, resolve=True))


@pytest.mark.parametrize(
    ("env", "module", "extra"),
    [
        ("hopper", "mujoco", "mujoco"),
        ("pusht", "gym_pusht", "pusht"),
        ("pusht_image", "gym_pusht", "pusht"),
        ("adroit_door", "gymnasium_robotics", "adroit"),
        ("fetch_pick_and_place", "gymnasium_robotics", "adroit"),
        ("franka_kitchen", "gymnasium_robotics", "adroit"),
        ("metaworld", "metaworld", "metaworld"),
        ("lift", "robomimic", "robomimic"),
        ("lift_image", "robosuite", "robomimic"),
    ],
)
def test_the_extra_is_named(env: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name == module or name.startswith(f"{module}."):
            monkeypatch.setitem(sys.modules, name, None)
        elif name.startswith("gymnasium.envs.mujoco"):  # they hold what they imported
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TaskError) as found:
        task_of(env).make()
    message = str(found.value)
    assert "\n" not in message
    assert message.count(". ") == 0
    assert f"[{extra}]" in message


def test_an_image_codec_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    monkeypatch.setitem(sys.modules, "imagecodecs.numcodecs", None)
    with pytest.raises(DataError, match=r"flowpolicy\[images\]"):
        image_codec("jpeg2000")
