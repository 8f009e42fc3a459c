"""Parts that users add: names are theirs alone, and started processes know them too."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flowpolicy import plugins
from flowpolicy.errors import ConfigError
from flowpolicy.flow.grids import GRIDS, Uniform, build_grid

MODULE = """
from flowpolicy.flow.grids import GRIDS, Uniform
from flowpolicy.plugins import register

@register(GRIDS)
class Even(Uniform):
    name = "even"
"""


class Other(Uniform):
    name = "uniform"


Other.__qualname__ = "Uniform"  # a class of another module may be called the same


def test_a_name_is_taken_once():
    registry = {}
    plugins.register(registry)(Uniform)
    plugins.register(registry)(Uniform)  # the same again, as when a module is loaded anew
    with pytest.raises(ConfigError, match="'uniform'; give it a name of its own"):
        plugins.register(registry)(Other)
    with pytest.raises(ConfigError, match="give it a name"):
        plugins.register(registry)(object())
    assert registry == {"uniform": Uniform}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the working directory that adds a grid."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv(plugins.VARIABLE, "")
    (tmp_path / "my_even_grid.py").write_text(MODULE)
    yield "my_even_grid"
    sys.modules.pop("my_even_grid", None)
    GRIDS.pop("even", None)


def test_a_module_of_the_working_directory_is_loaded_here_and_in_processes_started_from_here(
    module, forking_python
):
    with pytest.raises(ConfigError, match="even"):
        build_grid({"name": "even"})
    plugins.load([module])
    assert build_grid({"name": "even"}).steps(2) == Uniform().steps(2)
    assert os.environ[plugins.VARIABLE] == module
    code = "from flowpolicy.flow.grids import build_grid; print(build_grid({'name': 'even'}).name)"
    started = subprocess.run([forking_python, "-c", code], capture_output=True, text=True, check=True)
    assert started.stdout.strip() == "even"


def test_a_module_that_is_not_there_is_one_sentence(module):
    with pytest.raises(ConfigError, match=r"'no_such_module_at_all' cannot be imported"):
        plugins.load(["no_such_module_at_all"])
    assert os.environ[plugins.VARIABLE] == ""


def test_what_was_imported_is_known_in_started_processes_and_missed_by_none(module, forking_python):
    importlib.import_module(module)
    code = "from flowpolicy.flow.grids import build_grid; print(build_grid({'name': 'even'}).name)"
    started = subprocess.run([forking_python, "-c", code], capture_output=True, text=True, check=True)
    assert started.stdout.strip() == "even"
    Path(f"{module}.py").unlink()
    lost = subprocess.run([forking_python, "-c", code], capture_output=True, text=True, check=False)
    assert "grid.name is 'even'" in lost.stderr


def test_a_plugin_that_raises_is_refused_in_one_sentence(module):
    Path(f"{module}.py").write_text("raise ValueError('not today')")
    with pytest.raises(ConfigError, match=r"'my_even_grid' cannot be imported \(ValueError: not today\)\.$"):
        plugins.load([module])
