"""What is not installed is named in one sentence, with the extra that brings it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hydra", reason="hydra is not installed")

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from flowpolicy.data.image_codecs import image_codec
from flowpolicy.errors import DataError, TaskError
from flowpolicy.evaluation.task import task_from
from flowpolicy.plugins import VARIABLE


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
def test_the_extra_of_a_simulator(env: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gymnasium", reason="gymnasium is not installed")
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


def test_the_extra_of_an_image_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    monkeypatch.setitem(sys.modules, "imagecodecs.numcodecs", None)
    with pytest.raises(DataError, match=r"flowpolicy\[images\]"):
        image_codec("jpeg2000")


MISSING = [
    ("hydra", "pretrain", "train"),
    ("gymnasium", "collect_demos env=hopper", "train,mujoco"),
    ("stable_baselines3", "finetune_reinflow", "train,rl"),
    ("stable_baselines3", "train_expert env=hopper", "rl"),
    ("msgpack", "serve checkpoint=anything", "serve"),
    ("websockets", "serve checkpoint=anything", "serve"),
    ("h5py", "import_demos source=demos.hdf5 out=x.zarr.zip", "import"),
    ("minari", "import_demos source=toy/sample format=minari out=x.zarr.zip", "minari"),
    ("pyarrow", "import_demos source=toy/sample format=lerobot out=x.zarr.zip", "import"),
    ("huggingface_hub", "import_demos source=toy/sample format=lerobot out=x.zarr.zip", "hub"),
]
# Runs a script where a module cannot be imported, though it may be already, and this package is not yet.
WITHOUT = """
import runpy, sys
_, module, *sys.argv = sys.argv
for name in {module, *sys.modules}:
    if name.partition(".")[0] == module:
        sys.modules[name] = None
    elif name.startswith("flowpolicy"):
        del sys.modules[name]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("module", "command", "extra"), MISSING, ids=[" ".join(case[:2]) for case in MISSING]
)
def test_the_extra_of_a_script(
    module: str, command: str, extra: str, repo_root: Path, tmp_path: Path, forking_python: Path
) -> None:
    """The real script, in a process that cannot import the module; plugins are looked for too."""
    name, *options = command.split()
    (tmp_path / "demos.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n")
    program = [forking_python, "-c", WITHOUT, module, str(repo_root / "scripts" / f"{name}.py"), *options]
    known = {**os.environ, VARIABLE: "of_another_program?"}
    done = subprocess.run(program, cwd=tmp_path, env=known, capture_output=True, text=True, check=False)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    line = done.stderr.rstrip()
    assert line.endswith(f"pip install 'flowpolicy[{extra}]'.")
