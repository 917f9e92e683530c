"""Accuracy on held-out prompts with the current weights: greedy, and the mean over several samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from dcpo_megatron.data import Prompt
from dcpo_megatron.distributed import all_reduce_on_host
from dcpo_megatron.rewards import Rewarder
from dcpo_megatron.rollout import GenerateRequest, RolloutEngine, SamplingParams
from dcpo_megatron.rollout.streams import share, stream_seed


def evaluate(
    engine: RolloutEngine,
    tokenizer,
    rewarder: Rewarder,
    prompts: Sequence[Prompt],
    *,
    samples: int,
    temperature: float,
    max_response_tokens: int,
    stop_token_ids: tuple[int, ...],
    correct_at: float,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """``greedy``: share of prompts answered right at temperature 0; ``accuracy``: right answers over ``samples``
    samples a prompt at ``temperature``; ``response_length``: mean tokens of the sampled ones; ``reward_failures``:
    responses on which the reward function failed. Collective over the default group: prompts are dealt over all ranks,
    the numbers are the same on each.
    """
    jobs = [(prompt, sample) for prompt in prompts for sample in range(samples + 1)]
    jobs = share(jobs, dist.get_rank(), dist.get_world_size())
    # Sample number `samples` is the greedy one.
    counts = torch.zeros(4, dtype=torch.float64)
    for greedy in (True, False):
        mine = [(prompt, sample) for prompt, sample in jobs if (sample == samples) == greedy]
        sampling = SamplingParams(max_response_tokens, 0.0 if greedy else temperature, stop_token_ids=stop_token_ids)
        # One stream a (prompt, sample), the same at every evaluation: before and after differ by the weights only.
        requests = [
            GenerateRequest(prompt.token_ids, stream_seed(seed, -1, 0, prompt.id, sample)) for prompt, sample in mine
        ]
        generations = engine.generate(requests, sampling, progress)
        texts = [
            tokenizer.decode(generation.token_ids.tolist(), skip_special_tokens=True) for generation in generations
        ]
        rewards = rewarder.score(texts, [prompt.ground_truth for prompt, _ in mine])
        counts[0 if greedy else 1] += sum(reward >= correct_at for reward in rewards)
        if not greedy:
            counts[2] += sum(len(generation.token_ids) for generation in generations)
    counts[3] = sum(rewarder.failures.values())
    rewarder.failures.clear()
    right_greedy, right, tokens, failures = all_reduce_on_host(counts).tolist()
    total = len(prompts) * samples
    return {
        "greedy": right_greedy / len(prompts),
        "accuracy": right / total,
        "response_length": tokens / total,
        "reward_failures": failures,
    }
