"""One number per response from rewards: within the group (z-score, mean, leave-one-out) or with a history (SAS).

Groups may be split over data-parallel ranks; the statistics are exchanged, and all ranks agree bit for bit.
"""

from dcpo_megatron.advantages.sas import PromptStatistics, RewardHistory

from .dynamic_sampling import keep_mixed_groups
from .group import group_advantages

__all__ = ["PromptStatistics", "RewardHistory", "group_advantages", "keep_mixed_groups"]
