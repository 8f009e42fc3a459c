"""Off-policy algorithms: what is learnt around a flow from a critic of chunks. One file an algorithm."""

from flowpolicy.finetuning.offpolicy.algorithms.algorithm import Algorithm, FlowProposals
from flowpolicy.finetuning.offpolicy.algorithms.dsrl import DSRL
from flowpolicy.finetuning.offpolicy.algorithms.expo import EXPO
from flowpolicy.finetuning.offpolicy.algorithms.qchunk import QChunk
from flowpolicy.finetuning.offpolicy.algorithms.registry import ALGORITHMS, build_algorithm

__all__ = ["ALGORITHMS", "DSRL", "EXPO", "Algorithm", "FlowProposals", "QChunk", "build_algorithm"]
