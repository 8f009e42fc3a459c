"""Loads image batches with this package; see benchmarks/image_loading.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from loading_loop import serve

from flowpolicy.data.prefetch import Prefetcher
from flowpolicy.data.sampling import Batch, ChunkSampler, as_tensors, shuffled_index
from flowpolicy.data.store import read_demonstrations

KEYS = ("image", "agent_position")


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    demos = read_demonstrations(settings["store"], KEYS, settings["image_memory_bytes"])
    tensors = as_tensors(demos, [*KEYS, "action"], "cpu")
    action = tensors.pop("action")
    sampler = ChunkSampler(
        tensors, action, demos.episode_ends, settings["obs_horizon"], settings["action_horizon"]
    )

    def made(step: int) -> tuple[torch.Tensor, Batch]:
        batch = sampler.batch(shuffled_index(step, settings["batch_size"], len(sampler), seed=0))
        return ready(batch.observation["image"]), batch

    def batches() -> Iterator[tuple[torch.Tensor, Batch]]:
        prefetcher = Prefetcher(made, last=1 << 40)
        step = 0
        while True:
            yield prefetcher(step)
            step += 1

    def finish(pair: tuple[torch.Tensor, Batch]) -> list[Any]:
        pixels, batch = pair
        return [pixels, batch.observation["agent_position"], batch.action]

    serve(batches(), finish)


def ready(images: torch.Tensor) -> torch.Tensor:
    """As the image encoder begins: ``(B * T_o, C, H, W)`` float32 in [-1, 1]."""
    return images.flatten(0, 1).to(torch.float32).permute(0, 3, 1, 2) / 127.5 - 1.0


if __name__ == "__main__":
    main()
