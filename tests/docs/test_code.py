"""Code on the pages is code: Python parses and imports what exists, and commands are taken by the scripts."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from pages import ROOT, name, pages

from flowpolicy.plugins import VARIABLE

ALL = pages("*.md", "docs/**/*.md")
PYTHON = [page for page in ALL if any(block.language == "python" for block in page.blocks)]
SHELL = ("bash", "console")
WITHOUT_SETTINGS = ("doctor",)
PLACEHOLDER = re.compile(r"\w+=[A-Z_]+")  # env=NAME: the reader's own


@pytest.mark.parametrize("page", PYTHON, ids=name)
def test_python_parses_and_the_names_that_it_imports_exist(page):
    for block in page.blocks:
        if block.language == "python":
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flowpolicy"):
                    module = importlib.import_module(node.module)
                    for alias in node.names:
                        assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def commands(page):
    """Words of every command line of this package on the page, from the script's name on."""
    for block in page.blocks:
        if block.language in SHELL:
            for line in block.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                script = _script(words)
                if script is not None and script not in WITHOUT_SETTINGS:
                    yield script, words


def _script(words):
    """The script that a command line calls, and nothing for other commands."""
    for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False):
        if word.startswith("scripts/") and word.endswith(".py"):
            return word.removeprefix("scripts/").removesuffix(".py")
        if word == "flowpolicy" and before in ("", "-m"):
            return after.replace("-", "_")
    return None


@pytest.fixture
def importers():
    """As they were before a page entered its own among them; other tests go through all that there are."""
    registry = importlib.import_module("flowpolicy.data.importers.registry").FORMATS
    before = dict(registry)
    yield
    registry.clear()
    registry.update(before)


COMMANDS = list(
    dict.fromkeys((page, script, tuple(words)) for page in ALL for script, words in commands(page))
)


@pytest.mark.usefixtures("importers")
@pytest.mark.parametrize(
    ("page", "script", "words"),
    COMMANDS,
    ids=[f"{name(page)}-{number}-{script}" for number, (page, script, _) in enumerate(COMMANDS)],
)
def test_the_script_takes_the_command(page, script, words, tmp_path, monkeypatch):
    """With the settings composed as the script itself does, and nothing done with them."""
    pytest.importorskip("hydra")
    from flowpolicy.cli import script as program

    # A fifth of the time: the same interpolations are parsed each time, and the config is written.
    monkeypatch.setattr("omegaconf.base.parse", _parsed)
    monkeypatch.setattr("omegaconf._utils.parse", _parsed)
    monkeypatch.setattr("hydra.core.utils._save_config", lambda *_: None)

    assert (ROOT / "scripts" / f"{script}.py").is_file()
    options = [word for word in words if "=" in word or word == "--multirun"]
    options = [word for word in options if not word.startswith("--nproc") and not _chooses_own_task(word)]
    page.write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # put back afterwards, as is what plugins leave in the environment
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr("sys.argv", [f"scripts/{script}.py", *options])
    composed = []
    program(script)(lambda config, run_dir: composed.append(config))()
    assert composed
    for file in page.files:
        sys.modules.pop(Path(file).stem, None)


@functools.cache
def _parsed(*arguments):
    from omegaconf.grammar_parser import parse

    return parse(*arguments)


def _chooses_own_task(word):
    """A placeholder, or a file that a command before has written."""
    return word.startswith("env=") and (PLACEHOLDER.fullmatch(word) or word.endswith(".yaml"))
