"""Paths on the command line, which Hydra's grammar would take for something else."""

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from flowpolicy.cli import quoted_path

PATHS = [
    "/tmp/my file (1).hdf5", "/tmp/demo(1).hdf5", "/tmp/a,b.hdf5", "/tmp/lr=0.1/best", "/tmp/[old]/x.zarr",
    "/tmp/run#3", "runs/{a}/b", "/tmp/it's (2).h5", "C:\\data\\run (1)\\", "/tmp/a b,c=d#e[f](g){h}'i\"j.h5",
    "/tmp/x:y;z!.h5", "/tmp/ünïcode (1)", "/tmp/100%.h5", "/tmp/a&b|c.h5", "data/x, y/z",
]  # fmt: skip


@pytest.fixture(scope="module")
def base():
    with hydra.initialize_config_module("flowpolicy_configs", version_base="1.3"):
        return hydra.compose("import_demos")


def parsed(word):
    return OverridesParser.create().parse_override(word).value()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("key", ["source", "out", "run_dir"])
def test_a_path_arrives_as_it_was_typed(base, path, key):
    word = quoted_path(f"{key}={path}", base)
    with hydra.initialize_config_module("flowpolicy_configs", version_base="1.3"):
        assert hydra.compose("import_demos", overrides=[word])[key] == path


def test_a_file_that_exists_is_meant(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b", "[a]", "{a: b}", "12", "true"):
        (tmp_path / name).touch()
        found = parsed(quoted_path(f"source={name}", base, is_sweep=True))
        assert (getattr(found, "text", found)) == name


@pytest.mark.parametrize(
    "word",
    [
        "source='/tmp/a (1)'", 'source="/tmp/a,b"', "source=a,b", "source=null", "source=/tmp/plain.h5",
        "keys=[a,b]", "keys=[a,b", "rename={eef: obs/eef}", "+keys=[a]", "~source", "--help", "source=",
        "source=/a/${oc.env:HOME}/b", "source=[/a,/b]",
    ],
)  # fmt: skip
def test_lists_maps_quotes_and_interpolations_stay(base, word):
    assert quoted_path(word, base) == word


def test_a_sweep_over_paths_stays_one(base):
    assert quoted_path("source=/tmp/a,/tmp/b", base, is_sweep=True) == "source=/tmp/a,/tmp/b"
