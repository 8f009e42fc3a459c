"""The reference has an entry for every public name, and equations become MathML.

That the whole site is built without a warning is found by ``make docs``.
"""

from __future__ import annotations

import ast
import importlib.util
import sys

import pytest
from pages import ROOT

HOOKS = ROOT / "docs" / "hooks"
if not HOOKS.exists():
    pytest.skip("the documentation is not part of an installed package", allow_module_level=True)


@pytest.fixture(scope="module")
def load():
    """``load(name)`` is the hook of that name."""
    with pytest.MonkeyPatch.context() as patch:

        def load(name):
            spec = importlib.util.spec_from_file_location(name, HOOKS / f"{name}.py")
            module = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, name, module)
            spec.loader.exec_module(module)
            return module

        yield load


@pytest.fixture(scope="module")
def reference(load):
    return load("reference")


@pytest.fixture(params=["flowpolicy", "flowpolicy_envs"])
def modules(reference, request):
    return reference.public_modules(request.param)


def test_every_public_name_has_a_docstring_and_so_an_entry(modules):
    without = [
        f"{module.name}.{node.name}"
        for module in modules
        for node in module.definitions
        if not ast.get_docstring(node)
    ]
    assert not without
    assert not [module.name for module in modules if not module.summary]


def _pages(navigation):
    for entry in navigation:
        if isinstance(entry, str):
            yield entry
        else:
            for value in entry.values():
                yield from [value] if isinstance(value, str) else _pages(value)


def test_every_public_module_has_one_place_in_the_navigation(reference, modules):
    listed = list(_pages([reference.navigation(modules[0], modules)]))
    assert sorted(listed) == sorted(module.page for module in modules)
    names = [module.name for module in modules]
    assert not [each for each in names if "._" in each]
    assert names[0] in ("flowpolicy", "flowpolicy_envs")


def test_equations_become_mathml(load):
    markdown = pytest.importorskip("markdown")
    for needed in ("pymdownx", "latex2mathml"):
        pytest.importorskip(needed)
    text = (ROOT / "docs" / "flow_matching.md").read_text(encoding="utf-8")
    arithmatex = "pymdownx.arithmatex"
    html = markdown.markdown(text, extensions=[arithmatex], extension_configs={arithmatex: {"generic": True}})
    assert "arithmatex" in html
    shown = load("equations").on_page_content(html)
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in shown
    assert "arithmatex" not in shown
