"""The reference has an entry for every public name, and the site is built without a warning."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys

import pytest
from pages import ROOT

HOOK = ROOT / "docs" / "hooks" / "reference.py"
if not HOOK.exists():
    pytest.skip("the documentation is not part of an installed package", allow_module_level=True)


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("reference", HOOK)
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["reference"]


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


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    for needed in ("mkdocs", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(needed)
    # Not quietly: --strict counts the warnings that are shown.
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir"]
    done = subprocess.run(
        [*build, str(tmp_path / "site")], cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    equations = (tmp_path / "site" / "flow_matching" / "index.html").read_text()
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in equations
    assert "arithmatex" not in equations
