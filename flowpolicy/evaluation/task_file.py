"""The task of a recording: a YAML file made from what the recording declares."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.inspection import Inspection, KeySummary
from flowpolicy.data.keys import NOT_OBSERVED, TASK_INDEX, TASKS
from flowpolicy.data.task_texts import TASK_TEXT
from flowpolicy.features import Feature
from flowpolicy.features.stored import stored_feature
from flowpolicy.files.storage import atomic_file

CHUNK_S = 1.6
"""Seconds of an action chunk, as Diffusion Policy's 16 actions at 10 Hz: long enough to commit to one way of
doing something, short enough that what is seen now still says it."""
USUAL_HZ = 10.0
"""For the horizons, where a recording declares no rate."""
SHORTEST, LONGEST = 8, 64
"""Actions of a chunk; beyond, each step of sampling costs a robot's computer too much."""
PASSES, IMAGE_PASSES = 20, 40
"""Over the recording, in pretraining: Push-T from images scores 0.68 after 20 passes and 0.82 after 40."""
FEWEST_STEPS, MOST_STEPS = 2_000, 20_000
"""Of the optimiser."""
_PLAIN = re.compile(r"[A-Za-z_][\w.-]*")
_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}  # that YAML takes for other things


@dataclass(frozen=True)
class Horizons:
    """Steps of a policy's input and output.

    Attributes:
        observation: T_o.
        action: T.
        execute: T_e.
    """

    observation: int
    action: int
    execute: int


def horizons(control_hz: float, episode_length: float, *, has_images: bool) -> Horizons:
    """What suits a rate.

    A chunk of :data:`CHUNK_S` seconds, within 8 and 64 actions and an episode, of which
    half is executed: the other half is what bridges a late next one. Two observations show velocities;
    of images one, as a second costs as much as the first and adds little.

    Args:
        control_hz: of the recording.
        episode_length: median steps of an episode.
        has_images: whether a camera is observed.
    """
    chunk = min(max(round(CHUNK_S * control_hz), SHORTEST), LONGEST, max(2, int(episode_length)))
    chunk -= chunk % 2
    return Horizons(1 if has_images else 2, chunk, chunk // 2)


def training(num_steps: int, *, has_images: bool) -> tuple[int, int]:
    """Optimiser steps and batch size: about 20 passes, with images 40, over a recording of ``num_steps``."""
    batch_size, passes = (64, IMAGE_PASSES) if has_images else (128, PASSES)
    steps = min(max(passes * num_steps / batch_size, FEWEST_STEPS), MOST_STEPS)
    return round(steps / 500) * 500, batch_size


def task_file_of(store: Path | str) -> Path:
    """``my.yaml`` beside ``my.zarr.zip``."""
    path = Path(store).expanduser()
    return path.with_name(f"{re.sub(r'(.zarr)?(.zip)?$', '', path.name) or path.name}.yaml")


def write_task_file(path: Path, inspection: Inspection, store: Path | str) -> Path:
    """Write the task of a store that was inspected and is sound; returns ``path``.

    Args:
        path: of the new file, in the folder of the store.
        inspection: of the store.
        store: its path.
    """
    text = _text(path, inspection, Path(store))
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _text(path: Path, inspection: Inspection, store: Path) -> str:
    observed, left_out = _observed(inspection)
    names, count = _dimension_names(inspection), inspection.steps
    has_images = any(feature is not None and feature.is_frame for feature in observed.values())
    rate = _rate(inspection.attributes.get("fps"))
    length = LONGEST if inspection.lengths is None else float(np.median(inspection.lengths))
    found = horizons(rate or USUAL_HZ, length, has_images=has_images)
    steps, batch_size = training(count, has_images=has_images)
    low, high = _bounds(inspection.arrays["action"])
    lines = [
        f"# The task of {_comment(store.name)}, as its recording declares it; change what you know better.",
        f"# flowpolicy pretrain env={path.name}",
        f"name: {_scalar(_task_name(path.stem))}",
        "env_id: null  # no simulator; a Gymnasium id adds rollouts and fine-tuning",
        "observation_keys:",
        *(f"  - {_scalar(key)}  # {_described(key, feature, names)}" for key, feature in observed.items()),
        *(f"  # left out: {_scalar(key)}, {why}" for key, why in left_out.items()),
        f"obs_horizon: {found.observation}  # T_o, observations given to the policy; "
        + ("a second image costs as much as the first" if has_images else "two show velocities"),
        f"action_horizon: {found.action}  # T, actions predicted at once"
        + (f": {found.action / rate:.2g} s" if rate else ""),
        f"execute_horizon: {found.execute}  # T_e, of which so many are executed before the next chunk",
        f"control_hz: {rate}  # of the recording"
        if rate
        else "control_hz: ???  # the recording declares no rate: write it here, in steps a second",
        f"action_bounds:  # lowest and highest of the recording{_named(names.get('action'))}",
        f"  - [{', '.join(low)}]",
        f"  - [{', '.join(high)}]",
        "safe_action: hold  # without a valid command: the last one, as for positions; zero for velocities",
        f"demonstrations: {_scalar(store.name if store.parent == path.parent else str(store.resolve()))}",
        f"pretrain: {{steps: {steps}, batch_size: {batch_size}}}  # about {steps * batch_size / count:.0f} "
        f"passes over {count:,} steps",
    ]
    return "\n".join(lines) + "\n"


def _rate(declared: Any) -> float | None:
    """A recording's rate, where it declares one that can be."""
    is_number = isinstance(declared, (int, float)) and not isinstance(declared, bool)
    return float(declared) if is_number and 0.01 <= declared <= 10_000 else None


def _observed(inspection: Inspection) -> tuple[dict[str, Feature | None], dict[str, str]]:
    """What a policy can observe of a recording, and why it had better not observe the rest.

    A feature of None are the words of the task, which no array holds.
    """
    summaries = {summary.key: summary for summary in inspection.keys}
    observed: dict[str, Feature | None] = {}
    left_out = {}
    for key, array in inspection.arrays.items():
        if key in NOT_OBSERVED:
            continue
        feature = stored_feature(key, array.dtype, array.shape[1:], inspection.attributes, inspection.source)
        why = _reason_against(key, feature, summaries.get(key), inspection)
        if why:
            left_out[key] = why
        else:
            observed[key] = feature
    if not observed and left_out:  # better than nothing
        key = next(iter(left_out))
        del left_out[key]
        observed[key] = None
    if len(_tasks(inspection)) > 1 and TASK_TEXT not in inspection.arrays:
        observed[TASK_TEXT] = None
    return observed, left_out


def _reason_against(key: str, feature: Feature, summary: KeySummary | None, inspection: Inspection) -> str:
    if key.startswith("next."):
        return "which is known a step later"
    if key == "states":
        return "the state of the simulator, which no robot shows"
    if key in inspection.collapsing:
        return "whose numbers float32 cannot tell apart"
    if summary is not None and not feature.is_frame and len(summary.constant) == max(1, feature.size):
        return "which never changes"
    return ""


def _tasks(inspection: Inspection) -> list[str]:
    """The words of the tasks that occur."""
    words = inspection.attributes.get(TASKS)
    if not isinstance(words, list) or TASK_INDEX not in inspection.arrays:
        return []
    numbers = np.unique(np.asarray(inspection.arrays[TASK_INDEX]))
    return [str(words[int(number)]) for number in numbers if 0 <= number < len(words)]


def _described(key: str, feature: Feature | None, names: Mapping[str, list[str]]) -> str:
    if feature is None:
        return "what to do, in words" if key == TASK_TEXT else "nothing else is observed"
    if feature.is_frame:
        height, width, channels = feature.shape
        return f"image of {height} x {width}, {channels} channels"
    shape = " x ".join(map(str, feature.shape)) or "1"
    return f"{feature.name or 'vector'} of {shape}{_named(names.get(key))}"


def _named(names: list[str] | None) -> str:
    return f": {', '.join(names)}" if names else ""


def _dimension_names(inspection: Inspection) -> dict[str, list[str]]:
    """Key -> what the dimensions are called, where the source says it; by its own names of the columns."""
    declared = inspection.attributes.get("dimension_names")
    found = {}
    for name, names in declared.items() if isinstance(declared, Mapping) else ():
        key = "observation" if name == "observation.state" else name.removeprefix("observation.")
        array = inspection.arrays.get(key)
        if isinstance(names, list) and array is not None and array.shape[1:] == (len(names),):
            found[key] = [_comment(str(each))[:40] for each in names]
    return found


def _comment(text: str) -> str:
    """A text on one line of a YAML file, which takes no control characters."""
    return re.sub(r"\s+", " ", "".join(each if each.isprintable() else " " for each in text))


def _bounds(action: NDArray[Any]) -> tuple[list[str], list[str]]:
    """Lowest and highest of each dimension, in the fewest digits that are the same float32."""
    values = np.asarray(action)
    low, high = values.min(0).astype(np.float32), values.max(0).astype(np.float32)
    return [str(each) for each in low], [str(each) for each in high]


def _task_name(stem: str) -> str:
    return re.sub(r"[^\w.+\- ]", "-", stem)[:100]


def _scalar(text: str) -> str:
    """A text as YAML has it, quoted where it must be."""
    is_plain = _PLAIN.fullmatch(text) and text.lower() not in _WORDS
    return text if is_plain else json.dumps(text, ensure_ascii=False)
