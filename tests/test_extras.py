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
# A process that has imported what all scripts share, and runs each in a child that cannot import the module.
FORKING = """
import os, runpy, sys, traceback
import gymnasium, hydra, torch, zarr
scripts = sys.argv[1]
for number, (module, command) in enumerate(zip(sys.argv[2::2], sys.argv[3::2])):
    name, *options = command.split()
    if os.fork():
        os.wait()
        continue
    for stream in (1, 2):
        os.dup2(os.open(f"{number}.{stream}", os.O_CREAT | os.O_WRONLY), stream)
    sys.modules[module] = None
    sys.argv = [f"{scripts}/{name}.py", *options]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)  # to take down every module that the parent imported costs as much again
"""


@pytest.fixture(scope="module")
def refusals(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each script says on its two streams."""
    if not hasattr(os, "fork"):
        pytest.skip("the scripts are forked, which this system cannot")
    folder = tmp_path_factory.mktemp("refusals")
    (folder / "demos.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n")
    cases = [word for module, command, _ in MISSING for word in (module, command)]
    program = [sys.executable, "-c", FORKING, str(repo_root / "scripts"), *cases]
    subprocess.run(program, cwd=folder, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("number", range(len(MISSING)), ids=[" ".join(case[:2]) for case in MISSING])
def test_the_extra_of_a_script(number: int, refusals: Path) -> None:
    """The real script, in a process that cannot import the module."""
    assert (refusals / f"{number}.1").read_text() == ""
    (line,) = (refusals / f"{number}.2").read_text().splitlines()
    assert line.endswith(f"pip install 'flowpolicy[{MISSING[number][2]}]'.")
