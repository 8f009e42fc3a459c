"""A run folder belongs to one kind of run."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from flowpolicy.errors import CheckpointError, ConfigError
from flowpolicy.finetuning.offpolicy.algorithms import DSRL, build_algorithm
from flowpolicy.finetuning.offpolicy.config import OffPolicySettings
from flowpolicy.runs.run_folder import (
    FINETUNING,
    PRETRAINING,
    RunFolder,
    claim,
    comparable_settings,
    default_settings,
    refuse_other_kind,
    refuse_other_settings,
)


@pytest.mark.parametrize("kind", [PRETRAINING, FINETUNING, "evaluate"])
def test_only_the_owner_may_go_on(tmp_path, kind):
    refuse_other_kind(tmp_path, kind)  # nobody's
    claim(tmp_path, kind)
    refuse_other_kind(tmp_path, kind)
    with pytest.raises(ConfigError, match=f"holds a run of '{kind}', and this is 'plan'; choose") as caught:
        refuse_other_kind(tmp_path, "plan")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("base", FINETUNING), ("training_state.zip", FINETUNING), ("training_state", PRETRAINING)],
)
def test_folders_that_do_not_say_whose_they_are_show_it(tmp_path, name, kind):
    (tmp_path / name).mkdir()
    (tmp_path / "checkpoint").mkdir()
    refuse_other_kind(tmp_path, kind)
    with pytest.raises(ConfigError, match=kind):
        refuse_other_kind(tmp_path, "evaluate")


@pytest.mark.parametrize(
    ("holds", "resume", "outcome"),
    [
        ([], False, False),
        ([], True, False),
        (["state"], True, True),
        (["state", "result"], True, True),
        (["state"], False, "resume=true"),
        (["result"], False, "resume=true"),
        (["result"], True, "state is gone"),
    ],
)
def test_a_run_is_continued_where_that_is_asked_for_and_possible(tmp_path, holds, resume, outcome):
    for name in holds:
        (tmp_path / name).mkdir()
    folder = RunFolder(tmp_path, PRETRAINING, state="state", result="result")
    if isinstance(outcome, str):
        with pytest.raises(ConfigError, match=outcome):
            folder.continues(resume=resume)
    else:
        assert folder.continues(resume=resume) == outcome


def test_the_first_setting_that_differs_is_named_and_those_of_reporting_may(tmp_path):
    @dataclass
    class Config:
        seed: int = 0
        resume: bool = False
        train: dict[str, Any] = field(default_factory=lambda: {"steps": 10, "log_every": 5})

    reporting = ("resume", "train.log_every")
    saved = comparable_settings(Config(), reporting)
    assert saved == {"seed": 0, "train": {"steps": 10}}
    same = Config(resume=True, train={"steps": 10, "log_every": 1})
    refuse_other_settings(tmp_path, saved, comparable_settings(same, reporting))
    other = Config(train={"steps": 11, "log_every": 1})
    with pytest.raises(CheckpointError, match=r"trained with train\.steps=10 and not 11"):
        refuse_other_settings(tmp_path, saved, comparable_settings(other, reporting))


def test_a_setting_newer_than_a_run_is_its_default_there(tmp_path):
    @dataclass
    class Config:
        algorithm: dict[str, Any]
        offpolicy: OffPolicySettings = field(default_factory=OffPolicySettings)

    def resume(saved: dict[str, Any], **options: Any) -> None:
        algorithm = {"name": "dsrl", "bound": 2.0, **options}
        config = Config(algorithm)
        defaults = default_settings(config, algorithm=build_algorithm(algorithm))
        refuse_other_settings(tmp_path, saved, comparable_settings(config, ()), defaults)

    offpolicy = json.loads(json.dumps(dataclasses.asdict(OffPolicySettings())))
    del offpolicy["members"]
    old: dict[str, Any] = {"algorithm": {"name": "dsrl", "bound": 2.0}, "offpolicy": offpolicy}
    resume(old)
    resume(old, temperature=DSRL.temperature, actor_hidden=[256, 256])
    with pytest.raises(CheckpointError, match=r"algorithm\.temperature=0\.01 and not 0\.2"):
        resume(old, temperature=0.2)
    old["algorithm"]["temperature"] = 0.2
    with pytest.raises(CheckpointError, match=r"algorithm\.temperature=0\.2 and not 0\.01"):
        resume(old)
    ours, defaults = {"offpolicy": {**offpolicy, "members": 4}}, {"offpolicy": {"members": 5}}
    with pytest.raises(CheckpointError, match=r"offpolicy\.members=5 and not 4"):
        refuse_other_settings(tmp_path, {"offpolicy": offpolicy}, ours, defaults)


def test_how_demonstrations_are_made_is_not_a_runs_own(tmp_path):
    saved = {"env": {"name": "adroit_door", "control_hz": 100.0}}
    newer = {"env": {**saved["env"], "scripted": {"expert": "module:Class"}, "medium": None}}
    refuse_other_settings(tmp_path, saved, newer)
    with pytest.raises(CheckpointError, match=r"env\.control_hz=100\.0 and not 50\.0"):
        refuse_other_settings(tmp_path, saved, {"env": {**newer["env"], "control_hz": 50.0}})
