"""The device that a script computes on."""

from __future__ import annotations

import torch

from flowpolicy.errors import ConfigError


def has_fused_adam(device: torch.device) -> bool:
    """Whether Adam's step is one kernel there."""
    return device.type in ("cpu", "cuda")


def resolve_device(name: str, index: int = 0) -> torch.device:
    """A usable device: ``auto`` is GPU number ``index`` where there is one and the CPU elsewhere.

    Raises:
        ConfigError: when this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()  # "meta" is a device that holds no numbers
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device={name} is not available on this machine; use device=auto or device=cpu."
        ) from error
    return device
