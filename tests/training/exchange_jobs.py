"""Functions that run on the ranks of a pool: the exchange of responses."""

import math

import numpy as np
import torch.distributed as dist

from dcpo_megatron.data import Prompt, Response
from dcpo_megatron.distributed import host_group


def everything(seed: int, data_size: int) -> tuple[list[Prompt], list[Response], np.ndarray, np.ndarray]:
    """The same on every rank: prompts, all responses in the order of the table, who holds them and who trains them."""
    draw = np.random.default_rng(seed)
    prompts = [Prompt(f"p{n}", (1 + n, 2), "", "", "") for n in (3, 1, 2)]
    responses = []
    for prompt in prompts:
        for sample in range(7):
            tokens = int(draw.integers(0, 9)) if seed else 0  # once nothing at all
            responses.append(
                Response(
                    prompt.id, prompt.token_ids, "", sample, draw.integers(0, 2**31 - 1, tokens),
                    np.where(draw.random(tokens) < 0.1, -math.inf, -draw.random(tokens)), "stop",
                    np.sort(draw.integers(0, 3, tokens)), reward=float(draw.random()), advantage=float(draw.random()),
                    correct=bool(draw.random() < 0.5),
                )
            )  # fmt: skip
    return prompts, responses, draw.integers(0, dist.get_world_size(), 21), draw.integers(-1, data_size, 21)


def exchanged(data_ranks: tuple[int, ...], seeds: int) -> int:
    """Compares what arrives with what there is; returns how many responses came from another rank."""
    from dcpo_megatron.training.exchange import exchange_table, exchange_tokens

    rank, foreign = dist.get_rank(), 0
    for seed in range(seeds):
        prompts, responses, holder, trained_by = everything(seed, max(data_ranks) + 1)
        held = [response for response, owner in zip(responses, holder, strict=True) if owner == rank]
        table = exchange_table(held, prompts, 2, host_group())
        assert table.holder.tolist() == holder.tolist()
        for row, response in enumerate(responses):
            known = (
                table.prompt_id(row),
                table.sample[row],
                table.length[row],
                table.stale[row],
                table.total_length[row],
            )
            versions, tokens = response.weight_versions, len(response.token_ids)
            assert known == (response.prompt_id, response.sample_index, tokens, (versions < 2).sum(), tokens + 2)
            judged = table.reward[row], table.advantage[row], table.correct[row]
            assert judged == (response.reward, response.advantage, response.correct)
        found = exchange_tokens(table, held, trained_by, data_ranks, host_group())
        assert sorted(found) == [row for row in range(21) if trained_by[row] == data_ranks[rank]]
        for row, (token_ids, logprobs) in found.items():
            assert token_ids.tolist() == responses[row].token_ids.tolist()
            assert logprobs.tolist() == responses[row].rollout_logprobs.tolist()
            foreign += holder[row] != rank
    return int(foreign)


def stopped_by_bad_steps(folder: str):
    """Each rank holds one response; the message of each, and what rank 0 wrote."""
    from pathlib import Path

    from dcpo_megatron.mcore.step import UpdateResult
    from dcpo_megatron.monitor.bad_steps import BadSteps, BadStepsError

    rank = dist.get_rank()
    held = [Response("p", [1], "", rank, [3] * (4 * rank), [-0.5] * (4 * rank), "stop", [0] * (4 * rank))]
    try:
        BadSteps(Path(folder), 1, rank == 0).note(7, held, 3, [UpdateResult({"loss": 0.0}, {}, 1.0, False, 1e-6)])
    except BadStepsError as error:
        return str(error)
