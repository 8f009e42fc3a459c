"""Loads image batches with Diffusion Policy's own dataset and loader; see benchmarks/image_loading.py.

Its dataset reads the images of the whole chunk; ``first_images`` tells its sampler to read only those that the
policy sees, as its later datasets do.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from diffusion_policy.common.sampler import SequenceSampler
from diffusion_policy.dataset.pusht_image_dataset import PushTImageDataset
from loading_loop import batches, serve


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    horizon, seen = settings["action_horizon"], settings["obs_horizon"]
    dataset = PushTImageDataset(settings["zarr"], horizon=horizon, pad_before=seen - 1, pad_after=horizon - 1)
    if settings["first_images"]:
        dataset.sampler = SequenceSampler(
            replay_buffer=dataset.replay_buffer, sequence_length=horizon, pad_before=seen - 1,
            pad_after=horizon - 1, episode_mask=dataset.train_mask, key_first_k={"img": seen, "state": seen},
        )  # fmt: skip
        whole = dataset._sample_to_data

        def sample(parts: dict[str, Any]) -> dict[str, Any]:
            return whole({key: value if key == "action" else value[:seen] for key, value in parts.items()})

        dataset._sample_to_data = sample
    normalizer = dataset.get_normalizer()

    def finish(batch: dict[str, Any]) -> list[torch.Tensor]:
        observed = {key: value[:, :seen].float() for key, value in batch["obs"].items()}
        ready = normalizer.normalize({"image": observed["image"]})
        return [ready["image"], observed["agent_pos"], batch["action"]]

    serve(batches(dataset, settings), finish)


if __name__ == "__main__":
    main()
