"""Whose a run folder is: the files of one kind of run never replace those of another."""

from __future__ import annotations

from pathlib import Path

from flowpolicy.errors import ConfigError
from flowpolicy.files.reading import read_json
from flowpolicy.files.storage import write_json

PRETRAINING, FINETUNING = "pretrain", "finetune_reinflow"
_FILE = "run.json"


def claim(run_dir: Path, kind: str) -> None:
    """Write down that ``run_dir`` belongs to a run of ``kind``, the name of its script."""
    write_json(run_dir / _FILE, {"kind": kind})


def refuse_other_kind(run_dir: Path, kind: str) -> None:
    """Raise a ConfigError where ``run_dir`` belongs to a run of another kind."""
    owner = _owner(run_dir)
    if owner not in (None, kind):
        raise ConfigError(
            f"{run_dir} holds a run of '{owner}', and this is '{kind}'; choose another run_dir."
        )


def _owner(run_dir: Path) -> str | None:
    """The kind of run, which folders from before it was written down show by what they hold."""
    file = run_dir / _FILE
    if file.exists():
        return str(read_json(file).get("kind"))
    if any((run_dir / name).exists() for name in ("training_state.zip", "base")):
        return FINETUNING
    if any((run_dir / name).exists() for name in ("training_state", "checkpoint")):
        return PRETRAINING
    return None
