"""Update rules: how executed chunks and their advantages become a loss. One file a rule."""

from flowpolicy.finetuning.rules.awm import AWM
from flowpolicy.finetuning.rules.forward import ForwardRule, executed_sum
from flowpolicy.finetuning.rules.gdro import GDRO
from flowpolicy.finetuning.rules.nft import NFT
from flowpolicy.finetuning.rules.ppo import PPO
from flowpolicy.finetuning.rules.registry import UPDATE_RULES, build_update_rule
from flowpolicy.finetuning.rules.rule import Minibatch, UpdateRule, shared_draws
from flowpolicy.finetuning.rules.tempflow import TempFlow

__all__ = [
    "AWM",
    "GDRO",
    "NFT",
    "PPO",
    "UPDATE_RULES",
    "ForwardRule",
    "Minibatch",
    "TempFlow",
    "UpdateRule",
    "build_update_rule",
    "executed_sum",
    "shared_draws",
]
