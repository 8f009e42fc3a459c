"""What a policy is asked for its chunk: drawn from its file alone, and not by the code that reads it."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load

ROWS = 3


@dataclass(frozen=True)
class Question:
    """Observations and noise for a policy, drawn within what its normalisers saw.

    Attributes:
        observations: key -> ``(B, T_o, *shape)``; images are uint8.
        noise: x_0 ``(B, T, A)``.
        action_range: of its action normaliser, ``(A,)``.
    """

    observations: dict[str, NDArray[Any]]
    noise: torch.Tensor
    action_range: NDArray[np.float64]

    @classmethod
    def of(cls, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Question:
        """The question to the policy of a ``config.json`` and its tensors."""
        rng, observations = np.random.default_rng(0), dict[str, NDArray[Any]]()
        declared = config.get("observations", {})  # of format 2; format 1 has the shapes alone
        shapes = config.get("observation_shapes") or {key: item["shape"] for key, item in declared.items()}
        for key, shape in shapes.items():
            size = (ROWS, config["obs_horizon"], *shape)
            if len(shape) == 3:
                observations[key] = rng.integers(0, 256, size, np.uint8)
                continue
            stored = "%" + key.replace(".", "%2E") if "." in key else key
            center, scale = (
                tensors[f"observation_normalizers.{stored}.{name}"].numpy() for name in ("center", "scale")
            )
            observations[key] = (center + scale * rng.uniform(-1, 1, size)).astype(np.float32)
        size = (ROWS, config["action_horizon"], config["action_dim"])
        noise = torch.from_numpy(rng.standard_normal(size, np.float32))
        return cls(observations, noise, 2.0 * tensors["action_normalizer.scale"].double().numpy())

    @classmethod
    def of_checkpoint(cls, folder: Path) -> Question:
        """The question to the policy of a checkpoint's folder."""
        tensors = load((folder / "model.safetensors").read_bytes())
        return cls.of(json.loads((folder / "config.json").read_text()), tensors)

    @classmethod
    def of_model(cls, file: Path) -> Question:
        """The question to the policy of a ReinFlow model."""
        with zipfile.ZipFile(file) as archive:
            config = json.loads(archive.read("config.json"))["policy"]
            tensors = load(archive.read("model.safetensors"))
        prefix = "networks.flow_policy."
        inside = {name.removeprefix(prefix): value for name, value in tensors.items() if prefix in name}
        return cls.of(config, inside)
