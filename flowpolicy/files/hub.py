"""Checkpoints and datasets on the Hugging Face Hub.

``PyTorchModelHubMixin`` is not used: it has to be a base class, so that importing the package would need
``huggingface_hub``, and it reads weights by itself, without the checks that
:meth:`FlowPolicy.load` makes of a stranger's files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowpolicy.errors import CheckpointError, DataError
from flowpolicy.optional import optional


def download(repo_id: str) -> Path:
    """The folder of a repository's checkpoint.

    Raises:
        CheckpointError: it cannot be read, or ``huggingface_hub`` is not installed.
    """
    return _snapshot(
        repo_id, "checkpoint", CheckpointError, allow_patterns=["config.json", "model.safetensors"]
    )


def download_dataset(repo_id: str, allow_patterns: list[str]) -> Path:
    """The folder of a dataset's files that match the patterns.

    Raises:
        DataError: it cannot be read, or ``huggingface_hub`` is not installed.
    """
    return _snapshot(repo_id, "dataset", DataError, repo_type="dataset", allow_patterns=allow_patterns)


def upload(folder: Path, repo_id: str, *, private: bool) -> str:
    """Put a checkpoint's folder into a repository, which is made where there is none; its address."""
    hub = _hub("The", CheckpointError)
    hub.create_repo(repo_id, private=private, exist_ok=True)
    return str(hub.upload_folder(repo_id=repo_id, folder_path=str(folder)))


_Raised = type[CheckpointError] | type[DataError]


def _snapshot(repo_id: str, kind: str, raised: _Raised, **options: Any) -> Path:
    hub = _hub(f"No {kind} folder at {repo_id}, and the", raised)
    try:
        return Path(hub.snapshot_download(repo_id, **options))
    except Exception as error:  # network, authentication, unknown repository
        raise raised(
            f"{repo_id} is neither a folder nor a {kind} of the Hub that can be read "
            f"({type(error).__name__}); check the name and the network, or log in with 'hf auth login'."
        ) from error


def _hub(beginning: str, raised: _Raised) -> Any:
    with optional(f"{beginning} Hugging Face Hub needs huggingface_hub", "hub", raised):
        import huggingface_hub
    return huggingface_hub
