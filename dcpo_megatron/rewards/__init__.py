r"""Verifiable rewards: one number for each response. No torch, no other room of the package.

``math_reward`` is the paper's three-level reward; ``Rewarder`` scores batches by it or by a function of the user's,
under a time limit that holds in any thread and any process.
"""

from dcpo_megatron.rewards.function import RewardError, load_reward_function
from dcpo_megatron.rewards.mathematics.boxed import last_boxed
from dcpo_megatron.rewards.mathematics.judge import MathJudge, is_correct, math_reward, math_reward_batch
from dcpo_megatron.rewards.rewarder import Rewarder, ScoredReward, score

__all__ = [
    "MathJudge",
    "RewardError",
    "Rewarder",
    "ScoredReward",
    "is_correct",
    "last_boxed",
    "load_reward_function",
    "math_reward",
    "math_reward_batch",
    "score",
]
