"""The same evaluation split over processes, for machines with cores to spare."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flowpolicy.errors import FlowPolicyError
from flowpolicy.evaluation.result import EvaluationResult, concatenate
from flowpolicy.evaluation.rollout import EVALUATION_SEED, evaluate
from flowpolicy.evaluation.task import Task
from flowpolicy.execution.receding_horizon import ChunkPolicy
from flowpolicy.runs.progress import progress_bar
from flowpolicy.runs.worker_process import END_S, Failure, WorkerDiedError, WorkerProcess
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
    running: list[WorkerProcess] = []
    parts: list[EvaluationResult] = []
    try:
        for part in range(workers):
            first, last = edges[part], edges[part + 1]
            settings = {"episodes": last - first, "seed": seed + first, "show_progress": False, **options}
            if part == 0:
                settings["video"] = video  # the recorded episodes are the first ones, and those run here
            arguments = (path, task, load, settings)
            running.append(
                WorkerProcess(_serve, arguments, name="evaluation", preload=("__main__", __name__, "torch"))
            )
            running[-1].start()
        with progress_bar(episodes if show else None, f"evaluate {task.name}") as bar:
            for worker in running:
                parts.append(_result(worker))
                bar.update(len(parts[-1].returns))
    finally:
        for worker in running:
            worker.stop(0.0 if len(parts) < workers else END_S)
    return concatenate(parts)


def _result(worker: WorkerProcess) -> EvaluationResult:
    try:
        answer = worker.receive()
    except WorkerDiedError as error:
        raise FlowPolicyError(
            "A worker process of the evaluation died, most often for lack of memory; use fewer workers."
        ) from error
    if isinstance(answer, Failure):
        answer.raise_here()
    result: EvaluationResult = answer
    return result


def _serve(
    connection: Connection[Any, Any], path: str, task: Task, load: Loader, settings: dict[str, Any]
) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        connection.send(evaluate(load(path), task, **settings))
    except Exception as error:
        connection.send(Failure.of(error))
