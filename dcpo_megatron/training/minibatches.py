"""From a table of responses to minibatches of micro-batches: weights per token, and who trains on what.

Every rank computes the whole plan from the same table and receives the tokens of its data-parallel rank's part. A
minibatch's weights come from the WHOLE minibatch (:func:`~dcpo_megatron.objectives.aggregation_weights`), so its loss
does not depend on the plan.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from dcpo_megatron.data import Response
from dcpo_megatron.data.packing import PackingOptions, plan_micro_batches
from dcpo_megatron.data.response_table import ResponseTable
from dcpo_megatron.distributed import all_gather_on_host, host_group
from dcpo_megatron.mcore.batch import Sequence
from dcpo_megatron.mcore.layout import RankPosition
from dcpo_megatron.monitor.timeline import Timeline
from dcpo_megatron.objectives import Objective, aggregation_weights
from dcpo_megatron.training.exchange import Tokens, exchange_tokens

# plan[data_rank][micro_batch] = rows of the table
Plan = list[list[list[int]]]


@dataclass
class MinibatchMaker:
    """Makes a step's minibatches on this rank.

    ``prompts``: of a minibatch. ``multiple_of``: the number of micro-batches is one. ``data_ranks``: of each rank of
    the run. ``timeline`` gets the spans packing (the plan) and advantage (the exchange of tokens).
    """

    objective: Objective
    packing: PackingOptions
    prompts: int
    max_response_tokens: int
    multiple_of: int
    data_rank: int
    data_ranks: tuple[int, ...]
    timeline: Timeline

    def make(self, table: ResponseTable, held: Seq[Response]) -> tuple[list[np.ndarray], list[list[list[Sequence]]]]:
        """``(parts, minibatches)``: the rows of each minibatch, and its micro-batches on this rank, in whose sequences
        ``number`` is the row. Collective over all ranks; ``held``: this rank's responses, in the order of its rows."""
        with self.timeline.span("packing"):
            parts = split_minibatches(table, self.prompts)
            weights, plans = np.zeros(len(table)), []
            for rows in parts:
                weights[rows] = token_weights(table, rows, self.objective, self.max_response_tokens)
                plans.append(plan_minibatch(table, rows, self.packing, max(self.data_ranks) + 1, self.multiple_of))
            trained_by = np.full(len(table), -1)
            for plan in plans:
                for data_rank, micro_batches in enumerate(plan):
                    for micro_batch in micro_batches:
                        trained_by[micro_batch] = data_rank
        with self.timeline.span("advantage"):
            tokens = exchange_tokens(table, held, trained_by, self.data_ranks, host_group())
        mine = [plan[self.data_rank] for plan in plans]
        return parts, [[_sequences(table, rows, weights, tokens) for rows in plan] for plan in mine]


def gather_data_ranks(position: RankPosition) -> tuple[int, ...]:
    """The data-parallel rank of each rank. Collective over all ranks."""
    return tuple(int(answer) for answer in all_gather_on_host(str(position.data_rank).encode()))


def split_minibatches(table: ResponseTable, prompts: int) -> list[np.ndarray]:
    """The rows of each minibatch: ``prompts`` prompts each; the last one may have fewer."""
    if not len(table):
        return []
    _, number = np.unique(table.prompt, return_inverse=True)  # prompts without rows take no place
    return np.split(np.arange(len(table)), np.flatnonzero(np.diff(number // prompts)) + 1)


def token_weights(table: ResponseTable, rows: np.ndarray, objective: Objective, max_response_tokens: int) -> np.ndarray:
    """[len(rows)] fp64: the weight of each token of each response of ONE minibatch, per response."""
    _, prompt_index = np.unique(table.prompt[rows], return_inverse=True)
    return aggregation_weights(
        objective.aggregation,
        torch.from_numpy(table.length[rows]),
        torch.from_numpy(prompt_index),
        max_response_tokens=max_response_tokens,
    ).numpy()


def plan_minibatch(
    table: ResponseTable, rows: np.ndarray, packing: PackingOptions, data_size: int, multiple_of: int = 1
) -> Plan:
    """Who trains on which rows, in which micro-batches. Responses without tokens train nothing."""
    trained = rows[table.length[rows] > 0]
    plan = plan_micro_batches(table.total_length[trained].tolist(), data_size, packing, multiple_of)
    trained = trained.tolist()
    return [[[trained[k] for k in micro_batch] for micro_batch in micro_batches] for micro_batches in plan]


def _sequences(table: ResponseTable, rows: Seq[int], weights: np.ndarray, tokens: Tokens) -> list[Sequence]:
    return [
        Sequence(
            number=row,
            prompt_ids=table.prompts[table.prompt[row]].token_ids,
            response_ids=tokens[row][0],
            advantage=float(table.advantage[row]),
            weight=float(weights[row]),
            rollout_logprobs=torch.from_numpy(tokens[row][1]),
        )
        for row in rows
    ]
