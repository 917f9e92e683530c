"""From responses to minibatches of micro-batches: weights per token, and who trains on what.

Every rank computes the whole plan from the same responses and keeps its data-parallel rank's part. A minibatch's
weights come from the WHOLE minibatch (:func:`~dcpo_megatron.objectives.aggregation_weights`), so its loss does not
depend on the plan.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import chain

import numpy as np
import torch

from dcpo_megatron.data import Response
from dcpo_megatron.data.packing import PackingOptions, plan_micro_batches
from dcpo_megatron.mcore.batch import Sequence
from dcpo_megatron.objectives import Objective, aggregation_weights


def split_minibatches(responses: Seq[Response], prompts: int) -> list[list[int]]:
    """Indices of ``responses`` (which lie prompt by prompt), ``prompts`` prompts a minibatch; the last one may have
    fewer."""
    order = list(dict.fromkeys(response.prompt_id for response in responses))
    place = {prompt_id: number // prompts for number, prompt_id in enumerate(order)}
    minibatches: list[list[int]] = [[] for _ in range(-(-len(order) // prompts))]
    for index, response in enumerate(responses):
        minibatches[place[response.prompt_id]].append(index)
    return minibatches


def token_weights(responses: Seq[Response], objective: Objective, max_response_tokens: int) -> list[float]:
    """The weight of each token of each response of ONE minibatch, per response."""
    order = {prompt_id: number for number, prompt_id in enumerate(dict.fromkeys(r.prompt_id for r in responses))}
    lengths = torch.tensor([len(r.token_ids) for r in responses], dtype=torch.long)
    prompt_index = torch.tensor([order[r.prompt_id] for r in responses], dtype=torch.long)
    return aggregation_weights(
        objective.aggregation, lengths, prompt_index, max_response_tokens=max_response_tokens
    ).tolist()


def plan_minibatch(
    responses: Seq[Response],
    indices: Seq[int],
    objective: Objective,
    packing: PackingOptions,
    *,
    max_response_tokens: int,
    data_rank: int,
    data_size: int,
    multiple_of: int = 1,
) -> list[list[Sequence]]:
    """The micro-batches of data-parallel rank ``data_rank``; ``Sequence.number`` is the index into ``responses``.
    Responses without tokens train nothing."""
    members = [responses[i] for i in indices]
    weights = token_weights(members, objective, max_response_tokens)
    trained = [(i, r, w) for i, r, w in zip(indices, members, weights, strict=True) if r.token_ids]
    lengths = [len(r.prompt_token_ids) + len(r.token_ids) for _, r, _ in trained]
    plan = plan_micro_batches(lengths, data_size, packing, multiple_of)[data_rank]
    mine = [k for micro_batch in plan for k in micro_batch]
    values = chain.from_iterable(trained[k][1].rollout_logprobs for k in mine)
    logprobs = torch.from_numpy(np.fromiter(values, dtype=np.float32))
    logprobs_of = dict(zip(mine, logprobs.split([len(trained[k][1].token_ids) for k in mine]), strict=True))
    return [
        [
            Sequence(
                number=trained[k][0],
                prompt_ids=trained[k][1].prompt_token_ids,
                response_ids=trained[k][1].token_ids,
                advantage=_advantage(trained[k][1]),
                weight=trained[k][2],
                rollout_logprobs=logprobs_of[k],
            )
            for k in micro_batch
        ]
        for micro_batch in plan
    ]


def _advantage(response: Response) -> float:
    assert response.advantage is not None  # the rollout phase fills it in
    return response.advantage
