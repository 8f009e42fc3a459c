"""``from flowpolicy import FlowPolicy`` needs torch, numpy and safetensors, and nearly no time of its own."""

import json
import subprocess
import sys

import pytest

# Everything importable is refused but the standard library, this package, and what torch, numpy and
# safetensors bring with them (asked of their own metadata).
BLOCKED = """
import importlib.metadata, json, re, sys

needed, queue = set(), ["torch", "numpy", "safetensors"]
while queue:
    name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
    if name in needed:
        continue
    needed.add(name)
    try:
        requirements = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        continue
    queue += [re.match(r"[\\w.-]+", line).group() for line in requirements if "extra ==" not in line]

owners = importlib.metadata.packages_distributions()
def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()
allowed = {top for top, dists in owners.items() if any(normal(d) in needed for d in dists)}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        known = top in sys.stdlib_module_names or top in allowed or top == "flowpolicy" or top.startswith("_")
        if not known and top in owners:
            raise ModuleNotFoundError(f"{top} is blocked", name=top)

sys.meta_path.insert(0, Blocker())
import torch
before = set(sys.modules)
from flowpolicy import FlowPolicy
new = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
print(json.dumps([new, sorted(owners)]))
"""


def python(code, *arguments):
    done = subprocess.run(
        [sys.executable, *arguments, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def test_import_with_nothing_else_installed():
    new, owners = json.loads(python(BLOCKED).stdout)
    assert "flowpolicy" in new
    third_party = set(new) & set(owners) - set(sys.stdlib_module_names)
    assert third_party <= {"flowpolicy", "safetensors", "numpy"}
    assert "flowpolicy_envs" not in new


@pytest.mark.slow
def test_import_takes_less_than_half_a_second_more_than_torch():
    code = "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); "
    code += "from flowpolicy import FlowPolicy; print(time.perf_counter() - b)"
    # A busy machine makes it longer, and nothing makes it shorter: one of a few that is fast is enough.
    assert any(float(python(code).stdout) < 0.5 for _ in range(5))
