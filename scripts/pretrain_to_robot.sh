#!/usr/bin/env bash
# From demonstrations to a robot in real time: pretrain, fine-tune, choose a sampler, control.
#
#   bash scripts/pretrain_to_robot.sh           # Hopper on two CPU cores: about half an hour
#   SIZE=small bash scripts/pretrain_to_robot.sh   # the same path in a minute or two; the robot falls
#
# RUNS is the folder for everything (default runs/pretrain_to_robot); a run that was stopped is resumed.
# PYTHON is the interpreter (default: the virtual environment that make made, else python3).
set -euo pipefail
cd "$(dirname "$0")/.."

RUNS=${RUNS:-runs/pretrain_to_robot}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
small=()
finetune=() control=()
plan=(period_ms=4 quantile=0.99)
if [ "${SIZE:-full}" = small ]; then
    small=(model.width=32 model.depth=1 model.num_heads=2 train.steps=60 train.batch_size=32 train.warmup_steps=10
        train.final_episodes=2 train.validate_every=60 video=false)
    finetune=(total_steps=512 num_envs=4 workers=0 reinflow.n_steps=32 reinflow.batch_size=64 reinflow.n_epochs=1
        reinflow.critic_warmup=0 final_episodes=2 evaluation_envs=2 video=false)
    plan=(period_ms=100 quantile=0.9 calls=31 bouts=1 pause_s=0 episodes=2 observations=16 backends=[eager])
    control=(duration_s=2 spares=0 video=false)
fi

$PYTHON scripts/pretrain.py env=hopper policy=shortcut "${small[@]}" resume=true run_dir="$RUNS/pretrain"
$PYTHON scripts/finetune_reinflow.py env=hopper checkpoint="$RUNS/pretrain/checkpoint" "${finetune[@]}" resume=true \
    run_dir="$RUNS/finetune"
$PYTHON scripts/plan.py env=hopper checkpoint="$RUNS/finetune/checkpoint" "${plan[@]}" \
    run_dir="$RUNS/plan"
$PYTHON scripts/run_control.py robot=mujoco env=hopper checkpoint="$RUNS/finetune/checkpoint" plan="$RUNS/plan/plan.json" \
    "${control[@]}" run_dir="$RUNS/control"
