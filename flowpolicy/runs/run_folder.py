"""The owner of a run folder, and whether its run can be resumed: no run replaces the files of another."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowpolicy.errors import CheckpointError, ConfigError
from flowpolicy.files.reading import read_json
from flowpolicy.files.storage import write_json
from flowpolicy.settings import defaults, shown

PRETRAINING, DISTILLATION, FINETUNING = "pretrain", "distill", "finetune_reinflow"
OFFPOLICY = "finetune_offpolicy"
PREFERENCES = "finetune_preferences"
ROBOT = "finetune_robot"
_FILE = "run.json"
_SETTINGS = "config.json"


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run that can be continued.

    Attributes:
        path: of the folder.
        kind: of the run, the name of its script.
        state: what a run is continued from, by name.
        result: what only a finished run has, by name.
    """

    path: Path
    kind: str
    state: str
    result: str

    def continues(self, *, resume: bool) -> bool:
        """Whether there is a run to continue.

        Raises:
            ConfigError: it is a run of another kind, is not to be resumed, or has lost its state.
        """
        refuse_other_kind(self.path, self.kind)
        has_state, is_finished = ((self.path / name).exists() for name in (self.state, self.result))
        if not resume and (has_state or is_finished):
            raise ConfigError(
                f"{self.path} holds a run already; add resume=true to continue it, or choose another run_dir."
            )
        if is_finished and not has_state:
            raise ConfigError(
                f"{self.path} holds a finished run whose {self.state} is gone, so it cannot be continued; "
                "choose another run_dir."
            )
        return has_state

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Claim the folder and write down the settings."""
        claim(self.path, self.kind)
        write_json(self.path / _SETTINGS, dict(settings))

    def take_back(self, *folders: str) -> None:
        """Undo :meth:`begin` and what was written since: state, result, and ``folders`` that are empty."""
        for name in (self.state, self.result, _SETTINGS, _FILE):
            file = self.path / name
            if file.is_dir():
                shutil.rmtree(file)
            else:
                file.unlink(missing_ok=True)
        for name in folders:
            with contextlib.suppress(OSError):
                (self.path / name).rmdir()


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


def comparable_settings(config: Any, reporting: Iterable[str]) -> dict[str, Any]:
    """What a resumed run must have in common with the first one.

    Args:
        config: a dataclass.
        reporting: dotted names that are left out: they say where and how often a run reports.
    """
    settings = dataclasses.asdict(config)
    for name in reporting:
        group, _, key = name.rpartition(".")
        (settings[group] if group else settings).pop(key, None)
    return settings


def default_settings(config: Any, **named: Any) -> dict[str, Any]:
    """What the settings of ``config`` are where none are given.

    Args:
        config: a dataclass.
        named: what groups of settings with a ``name`` choose, such as ``algorithm``: dataclasses, or None.
    """
    chosen = {
        group: {"name": getattr(part, "name", None), **defaults(type(part))}
        for group, part in named.items()
        if part is not None
    }
    return {**defaults(type(config)), **chosen}


def refuse_other_settings(
    run_dir: Path,
    saved: Mapping[str, Any],
    settings: Mapping[str, Any],
    unset: Mapping[str, Any] = {},
) -> None:
    """Raise a CheckpointError that names the first of the ``settings`` in which a resumed run differs.

    Args:
        run_dir: of the run.
        saved: what it was begun with. A setting that there was not yet is the one of ``unset``, or else
            null, or false.
        settings: what it is to be resumed with.
        unset: see :func:`default_settings`.
    """
    if isinstance(saved.get("model"), Mapping):  # a run from before there were other networks and tokens
        model = {"network": "transformer", **saved["model"]}
        if model["network"] == "transformer":
            model.setdefault("actions_per_token", 1)
        saved = {**saved, "model": model}
    ours, absent = json.loads(json.dumps([settings, unset]))
    difference = next(_differences("", _own(saved), _own(ours), absent), None)
    if difference is not None:
        raise CheckpointError(
            f"{run_dir} was trained with {difference}; "
            "resume with the same settings or choose another run_dir."
        )


def _own(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without what only says how demonstrations are made, which may have come with a newer version."""
    env = settings.get("env")
    if not isinstance(env, Mapping):
        return settings
    kept = {key: value for key, value in env.items() if key not in ("scripted", "expert", "medium")}
    return {**settings, "env": kept}


def _differences(where: str, saved: Any, ours: Any, absent: Any) -> Iterator[str]:
    if isinstance(saved, Mapping) and isinstance(ours, Mapping):
        within = absent if isinstance(absent, Mapping) else {}
        for key in sorted(saved.keys() | ours.keys()):
            default = within.get(key)
            values = saved.get(key, default), ours.get(key, default), default
            yield from _differences(f"{where}.{key}" if where else key, *values)
    elif saved != ours and not (saved is None and ours is False):
        yield f"{where[:80]}={shown(saved)} and not {shown(ours)}"
