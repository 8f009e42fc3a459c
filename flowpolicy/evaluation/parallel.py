"""The same evaluation split over processes, for machines with cores to spare."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from flowpolicy.errors import FlowPolicyError
from flowpolicy.evaluation.result import EvaluationResult, concatenate
from flowpolicy.evaluation.rollout import EVALUATION_SEED, evaluate
from flowpolicy.evaluation.task import Task
from flowpolicy.execution.receding_horizon import ChunkPolicy
from flowpolicy.runs.progress import progress_bar
from flowpolicy.settings import require

Loader = Callable[[str], ChunkPolicy]


def load_policy(checkpoint: str, device: str = "cpu") -> ChunkPolicy:
    """Load a policy for evaluation (the default loader of :func:`evaluate_checkpoint`)."""
    from flowpolicy.policy import FlowPolicy
    from flowpolicy.runs.device import resolve_device

    return FlowPolicy.load(checkpoint).to(resolve_device(device))


def evaluate_checkpoint(
    checkpoint: Path | str,
    task: Task,
    *,
    episodes: int,
    workers: int = 1,
    seed: int = EVALUATION_SEED,
    load: Loader = load_policy,
    **options: Any,
) -> EvaluationResult:
    """:func:`evaluate` on a checkpoint, its episodes split over ``workers`` processes.

    Each worker loads the policy itself, computes with one thread, and takes a run of consecutive seeds,
    so the episodes are those that one process would have run. Results come back in the order of seeds.

    Args:
        checkpoint: folder of the policy.
        task: the environment and the horizons.
        episodes: how many in all.
        workers: processes; 1 stays in this one.
        seed: environment seed of the first episode.
        load: turns the path into a policy; importable from a module, since workers start afresh.
        options: further arguments of :func:`evaluate`.

    Raises:
        FlowPolicyError: as :func:`evaluate`, or when a worker dies.
    """
    require(workers >= 1, "workers", workers, "at least 1")
    require(episodes >= 1, "episodes", episodes, "at least 1")
    path = str(checkpoint)
    workers = min(workers, episodes)
    if workers == 1:
        return evaluate(load(path), task, episodes=episodes, seed=seed, **options)
    edges = [episodes * part // workers for part in range(workers + 1)]
    show = options.pop("show_progress", True)
    video = options.pop("video", None)
    parts: list[EvaluationResult] = []
    with (
        ProcessPoolExecutor(workers, mp_context=worker_context(__name__, "torch")) as pool,
        progress_bar(episodes if show else None, f"evaluate {task.name}") as bar,
    ):
        jobs = []
        for part in range(workers):
            first, last = edges[part], edges[part + 1]
            settings = {"episodes": last - first, "seed": seed + first, "show_progress": False, **options}
            if part == 0:
                settings["video"] = video  # the filmed episodes are the first ones, and those are here
            jobs.append(pool.submit(_work, path, task, load, settings))
        try:
            for job in jobs:
                parts.append(job.result())
                bar.update(len(parts[-1].returns))
        except BrokenProcessPool as error:
            raise FlowPolicyError(
                "A worker process of the evaluation died, most often for lack of memory; use fewer workers."
            ) from error
    return concatenate(parts)


def worker_context(*modules: str) -> Any:
    """A start method that is safe beside threads; a fork server imports ``modules`` once for all workers."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", *modules])
    return context


def _work(path: str, task: Task, load: Loader, settings: dict[str, Any]) -> EvaluationResult:
    import torch

    torch.set_num_threads(1)
    return evaluate(load(path), task, **settings)
