"""Paths on the command line, which Hydra's grammar would take for something else."""

import dataclasses
import shlex
from pathlib import Path
from typing import get_type_hints

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from flowpolicy.cli import command_line, script
from flowpolicy.control.run_config import RunConfig
from flowpolicy.errors import ConfigError
from flowpolicy.evaluation.sweep import EvaluationConfig
from flowpolicy.finetuning.config import FinetuneConfig
from flowpolicy.overrides import compose_or_refuse, quoted_path
from flowpolicy.pretraining.run import PretrainConfig
from flowpolicy.settings import build

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
def test_a_path_arrives_as_it_was_typed(base, path):
    for key in ("source", "out", "run_dir"):
        found = parsed(quoted_path(f"{key}={path}", base))
        assert getattr(found, "text", found) == path


def test_paths_of_all_kinds_survive_the_whole_config(base):
    overrides = [quoted_path(f"+paths.p{number}={path}", base) for number, path in enumerate(PATHS)]
    with hydra.initialize_config_module("flowpolicy_configs", version_base="1.3"):
        found = hydra.compose("import_demos", overrides=overrides).paths
    assert list(found.values()) == PATHS


@pytest.mark.parametrize(
    "word", ["source=[/tmp/x", "keys=[a,b", "/tmp/x.hdf5", "sou rce=/tmp/x", "source='/tmp/a"]
)
def test_what_cannot_be_read_is_refused_with_the_way_to_write_it(word, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["import_demos.py", "source=a", "out=b", word])
    with pytest.raises(SystemExit):
        script("import_demos")(lambda config, run_dir: None)()
    [sentence] = capsys.readouterr().err.splitlines()
    assert word in sentence
    assert "write" in sentence or "two pairs of quotes" in sentence


@pytest.mark.parametrize("flags", [[], ["--multirun"]])
def test_a_task_is_given_what_its_file_does_not_hold(flags, monkeypatch):
    words = ["env.env_kwargs.healthy_reward=0.5,0.6", "env.instruction='run on'", "env.control_hz=60"]
    typed = words if flags else [words[0].removesuffix(",0.6"), *words[1:]]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *flags, "env=hopper", *typed])
    with hydra.initialize_config_module("flowpolicy_configs", version_base="1.3"):
        found = compose_or_refuse("evaluate").env
    assert found.env_kwargs == {"healthy_reward": 0.5}
    assert (found.instruction, found.control_hz) == ("run on", 60)
    assert command_line().endswith(" ".join(["env=hopper", *map(shlex.quote, typed)]))


@pytest.mark.parametrize("word", ["env.instructions=run", "env.env_kwarg.a=1"])
def test_a_misspelt_setting_of_a_task_is_refused(word, monkeypatch):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "env=hopper", word])
    with hydra.initialize_config_module("flowpolicy_configs", version_base="1.3"), pytest.raises(ConfigError):
        compose_or_refuse("evaluate")


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


@pytest.mark.parametrize("config", [EvaluationConfig, PretrainConfig, FinetuneConfig, RunConfig])
@pytest.mark.parametrize("value", [False, True, 0, 2])
def test_video_is_a_switch_or_an_amount_everywhere(config, value):
    """Settings are checked by their types."""
    only_video = dataclasses.make_dataclass("Only", [("video", get_type_hints(config)["video"])])
    assert build(only_video, {"video": value}, "").video == value
    with pytest.raises(ConfigError, match="video"):
        build(only_video, {"video": "many"}, "")


@pytest.mark.parametrize("name", ["evaluate", "pretrain", "finetune_reinflow", "run_control"])
def test_every_program_films_unless_told_not_to(name):
    text = (Path(__file__).parents[1] / "configs" / f"{name}.yaml").read_text()
    assert "\nvideo: true " in text
