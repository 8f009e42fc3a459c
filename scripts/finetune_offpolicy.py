"""Fine-tune a policy off-policy: `python scripts/finetune_offpolicy.py env=hopper algorithm=expo`."""

from pathlib import Path
from typing import Any

from flowpolicy.cli import command_line, script
from flowpolicy.errors import TaskError
from flowpolicy.evaluation.task import task_from
from flowpolicy.optional import optional


@script("finetune_offpolicy")
def main(config: dict[str, Any], run_dir: Path) -> None:
    """Fine-tune, evaluate, and say where the results are."""
    with optional("Fine-tuning needs {name}", "train,rl", TaskError):
        from flowpolicy.finetuning.offpolicy.run import finetune_offpolicy

    task_from(config["env"]).simulator()
    del config["run_dir"]
    summary = finetune_offpolicy(config, run_dir, command=command_line())
    if summary is not None:
        print(summary)


if __name__ == "__main__":
    main()
