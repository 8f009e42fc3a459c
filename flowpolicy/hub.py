"""Checkpoints on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowpolicy.errors import CheckpointError


def download(repo_id: str) -> Path:
    """The folder of a repository's checkpoint.

    Raises:
        CheckpointError: it cannot be read, or ``huggingface_hub`` is not installed.
    """
    try:
        folder = _hub().snapshot_download(repo_id, allow_patterns=["config.json", "model.safetensors"])
    except CheckpointError as error:
        raise CheckpointError(
            f"No checkpoint folder at {repo_id}, and {str(error)[0].lower()}{str(error)[1:]}"
        ) from error
    except Exception as error:  # network, authentication, unknown repository
        raise CheckpointError(
            f"{repo_id} is neither a folder nor a Hub repository that can be read ({type(error).__name__})."
        ) from error
    return Path(folder)


def upload(folder: Path, repo_id: str, *, private: bool) -> str:
    """Put a checkpoint's folder into a repository, which is made where there is none; its address."""
    hub = _hub()
    hub.create_repo(repo_id, private=private, exist_ok=True)
    return str(hub.upload_folder(repo_id=repo_id, folder_path=str(folder)))


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            "The Hugging Face Hub needs huggingface_hub; install it with: pip install 'flowpolicy[hub]'."
        ) from error
    return huggingface_hub
