"""Choosing an OpenGL backend: the user's word counts, else the first that works; none is an answer too."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flowpolicy.errors import TaskError
from flowpolicy.evaluation import rendering
from flowpolicy.evaluation.task import Task

pytest.importorskip("mujoco")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="chosen on Linux only")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MUJOCO_GL", "")  # so that what the function sets is undone afterwards
    rendering.choose_gl_backend.cache_clear()
    yield
    rendering.choose_gl_backend.cache_clear()


def _working(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    tried: list[str] = []

    def works(name: str) -> bool:
        tried.append(name)
        return name in names

    monkeypatch.setattr(rendering, "_works", works)
    return tried


def test_egl_comes_first_and_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = _working(monkeypatch, "egl", "osmesa")
    assert rendering.choose_gl_backend() == rendering.choose_gl_backend() == "egl"
    assert os.environ["MUJOCO_GL"] == "egl"
    assert tried == ["egl"]


def test_osmesa_is_the_second_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = _working(monkeypatch, "osmesa")
    assert rendering.choose_gl_backend() == "osmesa"
    assert tried == ["egl", "osmesa"]


def test_without_any_the_answer_is_none_and_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = _working(monkeypatch)
    assert rendering.choose_gl_backend() is None
    assert os.environ["MUJOCO_GL"] == ""
    assert "glfw" not in tried
    assert rendering.NO_GL_BACKEND.count(". ") == 0


def test_a_users_choice_is_tried_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    tried = _working(monkeypatch, "egl")
    assert rendering.choose_gl_backend() is None
    assert tried == ["osmesa"]


def test_glfw_is_for_machines_with_a_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPLAY", ":0")
    _working(monkeypatch, "glfw")
    assert rendering.choose_gl_backend() == "glfw"


def test_the_probe_refuses_a_backend_that_does_not_exist() -> None:
    assert not rendering._works("no-such-backend")


@pytest.mark.parametrize("value", ["x", "osmesa"])
def test_a_choice_with_which_mujoco_cannot_be_imported_is_named(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gymnasium = pytest.importorskip("gymnasium")

    def imports_mujoco(**_: Any) -> None:
        raise RuntimeError("'NoneType' object has no attribute 'glGetError'")

    gymnasium.register("Drawn-v0", entry_point=imports_mujoco)
    monkeypatch.setitem(sys.modules, "mujoco", ModuleType("mujoco"))
    try:
        monkeypatch.setenv("MUJOCO_GL", value)
        with pytest.raises(TaskError, match="glGetError"):  # MuJoCo is there: that is something else
            Task("drawn", "Drawn-v0").make()
        monkeypatch.delitem(sys.modules, "mujoco")
        with pytest.raises(TaskError, match=rf"MUJOCO_GL is '{value}'.*set it to another one") as refused:
            Task("drawn", "Drawn-v0").make()
        assert "\n" not in str(refused.value)
    finally:
        gymnasium.registry.pop("Drawn-v0")


def test_a_model_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "model.xml").write_text("no\nmodel")
    with pytest.raises(TaskError, match="cannot be made") as refused:
        Task("hopper", "Hopper-v5", {"xml_file": str(tmp_path / "model.xml")}).make()
    assert "\n" not in str(refused.value)
