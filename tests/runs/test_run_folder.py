"""A run folder belongs to one kind of run."""

import pytest

from flowpolicy.errors import ConfigError
from flowpolicy.runs.run_folder import FINETUNING, PRETRAINING, claim, refuse_other_kind


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
