"""Who gets which tokens: after the plan each rank receives what it trains on, from those that sampled it.

Every rank knows the whole table and the whole plan, so nobody asks and no sizes travel. A rank sends each response as
often as its data-parallel rank has tensor-, pipeline- and context-parallel peers: together that is as much as it
receives.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from dcpo_megatron.data import Response
from dcpo_megatron.data.prompts import Prompt
from dcpo_megatron.data.response_table import ResponseTable, rows_of, table_of
from dcpo_megatron.distributed import CPU, all_gather_bytes

# row of the table -> (token ids [T] int32, rollout log-probs [T] fp32)
Tokens = dict[int, tuple[np.ndarray, np.ndarray]]


def exchange_table(
    held: Sequence[Response], prompts: Sequence[Prompt], version: int, group: dist.ProcessGroup
) -> ResponseTable:
    """The table of all ranks' responses. Collective over ``group`` (of the host); arguments as :func:`rows_of`."""
    rows = rows_of(held, prompts, version)
    payloads = all_gather_bytes(rows.tobytes(), group, CPU)
    return table_of(prompts, [np.frombuffer(payload).reshape(-1, rows.shape[1]) for payload in payloads])


def exchange_tokens(
    table: ResponseTable,
    held: Sequence[Response],
    trained_by: np.ndarray,
    data_ranks: Sequence[int],
    group: dist.ProcessGroup,
) -> Tokens:
    """The tokens of every row that this rank trains on. Collective over ``group`` (of the host).

    Args:
        held: this rank's responses, in the order of its rows.
        trained_by: [N] the data-parallel rank that trains on each row; -1: none does.
        data_ranks: the data-parallel rank of each rank of ``group``.
    """
    if len(data_ranks) == 1:
        rows = np.flatnonzero(trained_by >= 0).tolist()
        return {row: (held[row].token_ids, held[row].rollout_logprobs) for row in rows}
    rank = dist.get_rank(group)
    here = np.flatnonzero(table.holder == rank)
    parts: list[list[np.ndarray]] = [[] for _ in range(max(data_ranks) + 1)]
    for row, response in zip(here.tolist(), held, strict=True):
        if trained_by[row] >= 0:
            parts[trained_by[row]] += [response.token_ids, response.rollout_logprobs.view(np.int32)]
    messages = [np.concatenate([np.empty(0, np.int32), *part]) for part in parts]
    del parts
    wanted = np.flatnonzero(trained_by == data_ranks[rank])
    wanted = wanted[np.argsort(table.holder[wanted], kind="stable")]
    values = 2 * table.length[wanted]
    from_each = np.bincount(table.holder[wanted], weights=values, minlength=len(data_ranks)).astype(np.int64).tolist()
    sent = torch.from_numpy(np.concatenate([messages[data_rank] for data_rank in data_ranks]))
    to_each = [len(messages[data_rank]) for data_rank in data_ranks]
    received = torch.empty(int(values.sum()), dtype=torch.int32)
    dist.all_to_all_single(received, sent, from_each, to_each, group=group)
    found: Tokens = {}
    for row, end, length in zip(
        wanted.tolist(), np.cumsum(values).tolist(), table.length[wanted].tolist(), strict=True
    ):
        token_ids, logprobs = np.split(received.numpy()[end - 2 * length : end], 2)
        found[row] = (token_ids, logprobs.view(np.float32))
    return found
