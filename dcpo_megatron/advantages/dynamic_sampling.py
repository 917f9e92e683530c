"""Dynamic sampling (DAPO, arXiv 2503.14476, eq. 11): keep the prompts with 0 < correct < G, drop the rest.

A group that is all right or all wrong has no z-score; DAPO throws it away and samples other prompts in its place.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from dcpo_megatron.advantages.moments import exchange_moments


def keep_mixed_groups(
    prompt_ids: list[str], is_correct: Tensor, process_group: dist.ProcessGroup | None = None
) -> Tensor:
    """Which responses belong to a prompt with both right and wrong answers.

    Args:
        prompt_ids: `[n]`, the prompt of each response.
        is_correct: bool `[n]`.
        process_group: where groups may be split over ranks; collective. None = this process only.

    Returns:
        bool `[n]` on the device of `is_correct`; equal for all responses of a prompt.

    Raises:
        ValueError: missing ids or lengths that differ (on all ranks if on one).
        TypeError: an id that is not a str, `is_correct` that is not a bool tensor.
    """
    if not isinstance(is_correct, Tensor) or is_correct.dtype != torch.bool:
        raise TypeError("is_correct must be a bool tensor [n]; decide from the reward what counts as correct")
    moments, _ = exchange_moments(prompt_ids, is_correct, process_group)
    # Over zeros and ones, "0 < sum < G" and "not all equal" are the same.
    keep = [moments[prompt_id].minimum < moments[prompt_id].maximum for prompt_id in prompt_ids]
    return torch.tensor(keep, dtype=torch.bool, device=is_correct.device)
