"""The scripts that bring and inspect demonstrations."""

import pytest
from script_runs import run_script

pytest.importorskip("hydra", reason="hydra is not installed")


@pytest.mark.parametrize(
    ("script", "arguments", "mention"),
    [
        ("import_demos", ["source=x", "out=y", "formt=d4rl"], "format"),
        ("import_demos", ["source=x", "out=y", "env=pushd"], "pusht"),
        ("import_demos", ["out=y"], "source"),
        ("import_demos", ["source=missing.hdf5", "out=y"], "missing.hdf5"),
        ("inspect_demos", ["path=missing.zarr"], "missing.zarr"),
    ],
)
def test_a_mistake_ends_them_with_one_sentence(repo_root, tmp_path, script, arguments, mention):
    done = run_script(
        tmp_path, repo_root, f"{script}.py", *arguments, f"run_dir={tmp_path / 'run'}", fails=True
    )
    assert done.returncode == 1
    assert mention in done.stderr
    assert not (tmp_path / "y").exists()
