"""Loads image batches with robomimic's own dataset and loader; see benchmarks/image_loading.py."""

from __future__ import annotations

import json
import sys
from typing import Any

import robomimic.utils.obs_utils as obs_utils
import torch
from loading_loop import batches, serve
from robomimic.utils.dataset import SequenceDataset


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    sys.stdout, out = sys.stderr, sys.stdout
    obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": ["agent_position"], "rgb": ["image"]}})
    dataset = SequenceDataset(
        settings["hdf5"], obs_keys=("image", "agent_position"), dataset_keys=("actions",),
        frame_stack=settings["obs_horizon"], seq_length=settings["action_horizon"], pad_frame_stack=True,
        pad_seq_length=True, hdf5_cache_mode="low_dim", hdf5_use_swmr=False, load_next_obs=False,
    )  # fmt: skip
    sys.stdout = out
    seen = settings["obs_horizon"]

    def finish(batch: dict[str, Any]) -> list[torch.Tensor]:
        image = obs_utils.process_obs(batch["obs"]["image"][:, :seen], obs_key="image")
        return [image, batch["obs"]["agent_position"][:, :seen], batch["actions"]]

    serve(batches(dataset, settings), finish)


if __name__ == "__main__":
    main()
