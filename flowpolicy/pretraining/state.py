"""Training state on disk: everything a killed run needs to end where an unbroken one would.

Batches, noise and dropout are pure functions of (seed, step), so the state is the weights, their average,
those of a network that the loss has of its own, the optimiser's moments and the step. No pickle: tensors in
safetensors, the rest in JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from flowpolicy.errors import CheckpointError, ConfigError
from flowpolicy.files.reading import read_json, stored_tensors
from flowpolicy.files.storage import atomic_folder, load_optimizer, optimizer_tensors, save_tensors, under
from flowpolicy.ranges import Allowed, NonNegativeFloat
from flowpolicy.runs.run_folder import refuse_other_settings
from flowpolicy.settings import Settings, build

STATE_FOLDER = "training_state"
_REMEDY = "start again in another run_dir"


@dataclass
class TrainingState:
    """What is saved: live and averaged network, optimiser, the loss's own network, the steps done, and the
    seconds that earlier parts of the run took.
    """

    network: nn.Module
    averaged: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    auxiliary: nn.Module | None = None
    seconds: float = 0.0

    def save(self, run_dir: Path, settings: Mapping[str, Any], seconds: float = 0.0) -> None:
        """Write the state atomically, with the ``settings`` it belongs to and the seconds of this part."""
        tensors: dict[str, Tensor] = {}
        for prefix, module in self._modules.items():
            tensors.update({f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()})
        tensors.update(optimizer_tensors(self.optimizer, "optimizer"))
        content = {"step": self.step, "seconds": self.seconds + seconds, "settings": settings}
        with atomic_folder(run_dir / STATE_FOLDER) as folder:
            (folder / "state.json").write_text(json.dumps(content, indent=2) + "\n")
            save_tensors(tensors, folder / "state.safetensors")

    def load(self, run_dir: Path, settings: Mapping[str, Any]) -> bool:
        """Continue from ``run_dir``; False where there is nothing to continue from.

        Raises:
            CheckpointError: a damaged state, or one of a run with other settings (the first that differs
                is named).
        """
        folder = run_dir / STATE_FOLDER
        if not folder.exists():
            return False
        files = folder / "state.json", folder / "state.safetensors"
        for file in files:
            if not file.exists():
                raise _damaged(folder, f"{file.name} is missing")
        try:
            saved = build(_Saved, read_json(files[0], "training state", _REMEDY), "")
        except ConfigError as error:
            raise _damaged(folder, error) from error
        refuse_other_settings(run_dir, saved.settings, settings)
        stored = stored_tensors(files[1])
        expected = {
            f"{prefix}.{name}": tuple(tensor.shape)
            for prefix, module in self._modules.items()
            for name, tensor in module.state_dict().items()
        }
        stored.without("optimizer").require_shapes(expected, "network")
        tensors = stored.read()
        try:
            load_optimizer(self.optimizer, under(tensors, "optimizer"))
        except ValueError as error:
            raise _damaged(folder, error) from error
        for prefix, module in self._modules.items():
            module.load_state_dict(under(tensors, prefix))
        self.step, self.seconds = saved.step, saved.seconds
        return True

    @property
    def _modules(self) -> dict[str, nn.Module]:
        modules = {"network": self.network, "averaged": self.averaged}
        return modules if self.auxiliary is None else {**modules, "auxiliary": self.auxiliary}


def _damaged(folder: Path, reason: object) -> CheckpointError:
    return CheckpointError(
        f"The training state in {folder} is damaged ({str(reason).rstrip('.')}); {_REMEDY}."
    )


@dataclass(frozen=True)
class _Saved(Settings):
    """The content of ``state.json``."""

    step: Annotated[int, Allowed(lambda step: 0 <= step < 10**12, "0 or more and below 10^12")]
    settings: dict[str, Any]
    seconds: NonNegativeFloat = 0.0
