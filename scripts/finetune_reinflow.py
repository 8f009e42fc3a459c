"""Fine-tune a policy online: `python scripts/finetune_reinflow.py env=hopper num_steps=4`."""

from pathlib import Path
from typing import Any

from flowpolicy.cli import alone_in, chosen, command_line, composed, script
from flowpolicy.errors import TaskError
from flowpolicy.evaluation.task import task_from
from flowpolicy.optional import optional
from flowpolicy.pretraining.run import find_or_pretrain
from flowpolicy.runs.distributed import processes

BASES = Path("runs/base")


@script("finetune_reinflow")
def main(config: dict[str, Any], run_dir: Path) -> None:
    """Pretrain where no checkpoint is given, fine-tune, evaluate, and say where the results are."""
    with optional("Fine-tuning needs {name}", "train,rl", TaskError):
        from flowpolicy.finetuning.run import finetune

    task_from(config["env"]).simulator()  # refused before a policy is pretrained for it
    base = config.pop("base")
    del config["run_dir"]
    with processes(config["device"]):  # under torchrun: one group for pretraining and fine-tuning
        if config["checkpoint"] is None:
            env = chosen("env")
            overrides = [f"env={env}", *(f"{key}={value}" for key, value in base.items())]
            folder = BASES / "-".join([env, *(f"{key}_{value}" for key, value in base.items())])
            settings = {**composed("pretrain", overrides), "device": config["device"]}
            with alone_in(folder):
                config["checkpoint"] = str(find_or_pretrain(settings, folder))
        summary = finetune(config, run_dir, command=command_line())
    if summary is not None:
        print(summary)


if __name__ == "__main__":
    main()
