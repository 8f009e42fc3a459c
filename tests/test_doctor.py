"""The doctor's screen: with everything, and with the core dependencies alone."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from flowpolicy import doctor
from flowpolicy.evaluation.rendering import NO_GL_BACKEND

REQUIRES = [
    "torch>=2.6",
    'zarr>=3; extra == "train"',
    'imageio[ffmpeg]>=2.34; extra == "train"',
    'flowpolicy[train]; extra == "rl"',
    'stable-baselines3>=2.6; extra == "rl"',
    'tqdm<1; extra == "old"',
    'pytest; extra == "test"',
]
INSTALLED = {"torch": "2.7", "numpy": "2.0", "safetensors": "0.5", "imageio": "2.37", "tqdm": "4.66"}
# Runs the command where nothing but the core can be imported, and no version of anything else is known.
CORE_ALONE = """
import sys
from importlib import abc, metadata

packages = metadata.packages_distributions()
core = {"torch", "numpy", "safetensors", "flowpolicy"}
import torch, numpy, safetensors
needed = set(sys.modules)

class Refused(abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        root = name.partition(".")[0]
        if root in packages and not root.startswith("flowpolicy") and root not in needed:
            raise ModuleNotFoundError(f"No module named {root!r}", name=root)

sys.meta_path.insert(0, Refused())
version = metadata.version
def known(name):
    if name not in core:
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = known
sys.modules["mujoco"] = None
sys.argv = ["flowpolicy", "doctor"]
from flowpolicy.__main__ import main
main()
"""


def test_an_extra_lists_what_it_lacks_of_others_too_with_the_command(monkeypatch):
    def version(name):
        if name not in INSTALLED:
            raise metadata.PackageNotFoundError(name)
        return INSTALLED[name]

    monkeypatch.setattr(doctor.metadata, "requires", lambda name: REQUIRES)
    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(doctor, "choose_gl_backend", lambda: None)
    pytest.importorskip("packaging")
    lines = doctor.report().splitlines()
    extras = [" ".join(line.split()) for line in lines[lines.index("Extras") + 1 :]]
    assert extras == [
        "old lacks tqdm<1 (it is 4.66): pip install 'flowpolicy[old]'",
        "rl lacks stable-baselines3, zarr: pip install 'flowpolicy[rl]'",
        "train lacks zarr: pip install 'flowpolicy[train]'",
    ]


@pytest.mark.parametrize(
    ("backend", "refused", "words"),
    [("egl", None, "egl works"), (None, None, NO_GL_BACKEND), (None, "MUJOCO_GL is 'x'", "MUJOCO_GL is 'x'")],
)
def test_it_says_which_gl_backend_works(monkeypatch, backend, refused, words):
    pytest.importorskip("mujoco")
    monkeypatch.setattr(doctor, "choose_gl_backend", lambda: backend)
    monkeypatch.setattr(doctor, "refused_gl_choice", lambda: refused)
    assert words in doctor.report()


def test_it_fits_a_screen(monkeypatch):
    monkeypatch.setattr(doctor, "choose_gl_backend", lambda: "egl")
    lines = doctor.report().splitlines()
    assert len(lines) <= 40
    labels = [line.split("  ")[0] for line in lines if line and not line.startswith(" ")]
    assert {"flowpolicy", "Python", "torch", "CPU", "GPU", "Memory", "Disk", "Rendering"} <= set(labels)


def test_the_core_dependencies_are_enough():
    done = subprocess.run([sys.executable, "-c", CORE_ALONE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "MuJoCo is not installed" in done.stdout
    assert "ONNX Runtime  not installed" in done.stdout
    assert "pip install 'flowpolicy[train]'" in done.stdout


def test_a_setting_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "flowpolicy", "doctor", "env=hopper"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "doctor takes no settings, and 'env=hopper' is one; leave it out.\n"
