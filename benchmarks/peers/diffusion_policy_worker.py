"""Trains Diffusion Policy's own transformer with its own dataset, loader, normaliser, optimiser and EMA.

Run by benchmarks/training_throughput.py with a Python that has that project's requirements and a checkout of
it on PYTHONPATH. Reads a number of optimiser steps from stdin, answers the seconds they took, until stdin ends.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from diffusion_policy.dataset.pusht_dataset import PushTLowdimDataset
from diffusion_policy.model.diffusion.ema_model import EMAModel
from diffusion_policy.model.diffusion.transformer_for_diffusion import TransformerForDiffusion


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    horizon = settings["action_horizon"]
    dataset = PushTLowdimDataset(settings["zarr"], horizon=horizon, pad_before=1, pad_after=7)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=settings["batch_size"],
        shuffle=True,
        num_workers=1,
        persistent_workers=True,
        drop_last=True,
    )
    normalizer = dataset.get_normalizer()
    model = TransformerForDiffusion(
        input_dim=2,
        output_dim=2,
        horizon=horizon,
        n_obs_steps=2,
        cond_dim=20,
        n_layer=settings["depth"],
        n_head=settings["num_heads"],
        n_emb=settings["width"],
        p_drop_emb=0.0,
        p_drop_attn=settings["dropout"],
        causal_attn=True,
        time_as_cond=True,
        obs_as_cond=True,
        n_cond_layers=0,
    )
    optimizer = model.configure_optimizers(learning_rate=1e-4, weight_decay=0.1, betas=(0.9, 0.95))
    import copy

    ema = EMAModel(copy.deepcopy(model), update_after_step=0, inv_gamma=1.0, power=0.75, max_value=0.9999)
    model.train()

    def batches():
        while True:
            yield from loader

    stream = batches()

    def step() -> float:
        batch = normalizer.normalize(next(stream))
        action, observation = batch["action"], batch["obs"][:, :2]
        noise, t = torch.randn_like(action), torch.rand(len(action))
        weight = t[:, None, None]
        velocity = model((1 - weight) * noise + weight * action, 100 * t, observation)
        loss = torch.nn.functional.mse_loss(velocity, action - noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model)
        return loss.item()

    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps({"parameters": parameters}), flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        for _ in range(int(line)):
            step()
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main()
