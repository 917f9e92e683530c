"""Advantages from the rewards of one prompt's group alone, without a history.

    group          A_j = (R_j - mean)/sigma            z-score (GRPO, arXiv 2402.03300)
    mean           A_j = R_j - mean                    Dr.GRPO (arXiv 2503.20783)
    leave_one_out  A_j = R_j - mean of the other R     RLOO (arXiv 2402.14740), = n/(n - 1) (R_j - mean)

No epsilon is added to sigma, nothing is clipped or whitened. A constant group has no preference: its advantages are 0.
Rewards that differ by rounding only are constant (`moments.sigma_of`).
"""

import warnings
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dcpo_megatron.advantages.moments import Moments, exchange_moments


def group_advantages(
    prompt_ids: list[str],
    rewards: Tensor,
    mode: Literal["group", "mean", "leave_one_out"],
    std_ddof: Literal[0, 1] = 0,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Advantage of every response within its prompt's group.

    Args:
        prompt_ids: `[n]`, the prompt of each response; equal ids form a group.
        rewards: `[n]`, one reward per response.
        mode: "group", "mean" or "leave_one_out", the names of `Objective.advantage`.
        std_ddof: 0 population, 1 sample standard deviation; only for "group".
        process_group: where groups may be split over ranks; collective. None = this process only.

    Returns:
        float64 `[n]`, on the device of `rewards`.

    Raises:
        ValueError: unknown mode or std_ddof; missing ids, rewards that are not finite, lengths that differ (on all
            ranks if on one).
        TypeError: an id that is not a str.
    """
    if mode == "sas":
        raise ValueError("mode = 'sas' needs the rewards of earlier visits; use RewardHistory.observe")
    if mode not in ("group", "mean", "leave_one_out"):
        raise ValueError(f"mode = {mode!r} is not known; allowed: 'group', 'mean', 'leave_one_out'")
    if std_ddof not in (0, 1):
        raise ValueError(f"std_ddof = {std_ddof!r} is not possible; allowed: 0 (population), 1 (sample)")
    moments, values = exchange_moments(prompt_ids, rewards, process_group)
    if any(moments[prompt_id].count == 1 for prompt_id in prompt_ids):
        warnings.warn("a prompt with a single response has no group to compare with; its advantage is 0", stacklevel=2)
    advantages = [_advantage(reward, moments[i], mode, std_ddof) for i, reward in zip(prompt_ids, values, strict=True)]
    return torch.tensor(advantages, dtype=torch.float64, device=rewards.device)


def _advantage(reward: float, moments: Moments, mode: str, std_ddof: int) -> float:
    sigma = moments.sigma(std_ddof if mode == "group" else 0)
    if sigma == 0.0:  # also the group of one
        return 0.0
    if mode == "group":
        return (reward - moments.mean) / sigma
    scale = moments.count / (moments.count - 1) if mode == "leave_one_out" else 1.0
    return (reward - moments.mean) * scale
