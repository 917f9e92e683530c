"""From a table of responses to minibatches of micro-batches: weights per token, and who trains on what.

Every rank computes the whole plan from the same table and receives the tokens of its data-parallel rank's part. A
minibatch's weights come from the WHOLE minibatch (:func:`~dcpo_megatron.objectives.aggregation_weights`), so its loss
does not depend on the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dcpo_megatron.data import Response
from dcpo_megatron.data.packing import PackingOptions, plan_micro_batches
from dcpo_megatron.data.response_table import ResponseTable
from dcpo_megatron.distributed import all_gather_on_host, host_group
from dcpo_megatron.mcore.batch import TrainingSample
from dcpo_megatron.mcore.layout import RankPosition
from dcpo_megatron.monitor.timeline import Timeline
from dcpo_megatron.objectives import Objective, aggregation_weights
from dcpo_megatron.training.exchange import Tokens, exchange_tokens


@dataclass(frozen=True)
class StepPlan:
    """``parts``: the rows of each minibatch. ``micro_batches[minibatch][micro_batch]``: rows of this rank. ``weights``
    [N]: of each token of a row. ``trained_by`` [N]: the data-parallel rank that trains on a row; -1: none does."""

    parts: list[np.ndarray]
    micro_batches: list[list[list[int]]]
    weights: np.ndarray
    trained_by: np.ndarray


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

    def make(
        self, table: ResponseTable, held: Sequence[Response]
    ) -> tuple[list[np.ndarray], list[list[list[TrainingSample]]]]:
        """``(parts, minibatches)``: the rows of each minibatch, and its micro-batches on this rank, in whose sequences
        ``number`` is the row. Collective over all ranks; ``held``: this rank's responses, in the order of its rows."""
        with self.timeline.span("packing"):
            plan = self.plan(table)
        with self.timeline.span("advantage"):
            tokens = exchange_tokens(table, held, plan.trained_by, self.data_ranks, host_group())
        return plan.parts, self.sequences(table, plan, tokens)

    def plan(self, table: ResponseTable) -> StepPlan:
        """The same on every rank."""
        parts = split_minibatches(table, self.prompts)
        weights, trained_by, micro_batches = np.zeros(len(table)), np.full(len(table), -1), []
        for rows in parts:
            weights[rows] = token_weights(table, rows, self.objective, self.max_response_tokens)
            dealt = plan_minibatch(table, rows, self.packing, max(self.data_ranks) + 1, self.multiple_of)
            for data_rank, theirs in enumerate(dealt):
                trained_by[[row for micro_batch in theirs for row in micro_batch]] = data_rank
            micro_batches.append(dealt[self.data_rank])
        return StepPlan(parts, micro_batches, weights, trained_by)

    def sequences(self, table: ResponseTable, plan: StepPlan, tokens: Tokens) -> list[list[list[TrainingSample]]]:
        """This rank's micro-batches of each minibatch."""

        def sequence(row: int) -> TrainingSample:
            token_ids, logprobs = tokens[row]
            return TrainingSample(
                number=row,
                prompt_ids=table.prompts[table.prompt[row]].token_ids,
                response_ids=token_ids,
                advantage=float(table.advantage[row]),
                weight=float(plan.weights[row]),
                rollout_logprobs=torch.from_numpy(logprobs),
            )

        return [[[sequence(row) for row in rows] for rows in micro_batches] for micro_batches in plan.micro_batches]


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
) -> list[list[list[int]]]:
    """``[data_rank][micro_batch]``: rows, as :func:`~dcpo_megatron.data.packing.plan_micro_batches` deals them.
    Responses without tokens train nothing."""
    trained = rows[table.length[rows] > 0]
    plan = plan_micro_batches(table.total_length[trained].tolist(), data_size, packing, multiple_of)
    trained = trained.tolist()
    return [[[trained[k] for k in micro_batch] for micro_batch in micro_batches] for micro_batches in plan]
