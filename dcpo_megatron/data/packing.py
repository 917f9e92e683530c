"""Lays the responses of one minibatch out into micro-batches: a pure function of their lengths.

    responses --(balance by attention cost)--> data-parallel ranks --(first fit, longest first)--> micro-batches under a token budget

Invariants of :func:`plan_micro_batches`, for any input:

- every index appears exactly once;
- every rank has the same number of micro-batches (pipeline stages and collectives would hang otherwise), a multiple of ``multiple_of``;
- a micro-batch is within the budget unless it holds a single response that is longer than the budget;
- the plan depends on the arguments only: every rank computes the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PackingOptions:
    """``max_tokens``: budget of a micro-batch in tokens (padding included). ``packed``: sequences end to end in one row; otherwise one a row, so that a
    micro-batch costs rows x longest. ``align``: every length is rounded up to a multiple of it. ``attention_length``: tokens at which a sequence's attention
    costs as much as the rest of its layers (about 6 x hidden width)."""

    max_tokens: int
    packed: bool = True
    align: int = 1
    attention_length: int = 8192

    def __post_init__(self):
        for name in ("max_tokens", "align", "attention_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def plan_micro_batches(
    lengths: Sequence[int], data_parallel_size: int, options: PackingOptions, multiple_of: int = 1
) -> list[list[list[int]]]:
    """``plan[rank][micro_batch]`` = indices into ``lengths`` (tokens of prompt + response). See the module's text for what always holds.

    Raises:
        ValueError: a length below 1, or a size below 1.
    """
    if data_parallel_size < 1 or multiple_of < 1:
        raise ValueError(f"data_parallel_size={data_parallel_size} and multiple_of={multiple_of} must be at least 1")
    if any(length < 1 for length in lengths):
        raise ValueError("every sequence must have at least one token")
    padded = [-(-length // options.align) * options.align for length in lengths]
    per_rank = _balance(padded, data_parallel_size, options)
    plans = [_fill(indices, padded, options) for indices in per_rank]
    count = max(1, max(len(plan) for plan in plans))
    count = -(-count // multiple_of) * multiple_of
    for plan in plans:
        _spread(plan, count, padded, options)
    return plans


def cost(length: int, options: PackingOptions) -> float:
    """Relative compute of one sequence of ``length`` tokens: linear layers plus attention."""
    return length * (1.0 + length / options.attention_length)


def _balance(padded: list[int], ranks: int, options: PackingOptions) -> list[list[int]]:
    """Longest processing time first: each response goes to the rank with the least cost so far."""
    loads, shares = [0.0] * ranks, [[] for _ in range(ranks)]
    for index in sorted(range(len(padded)), key=lambda i: (-padded[i], i)):
        rank = min(range(ranks), key=lambda r: (loads[r], r))
        loads[rank] += cost(padded[index], options)
        shares[rank].append(index)
    return shares


def _size(indices: list[int], padded: list[int], options: PackingOptions) -> int:
    if not indices:
        return 0
    if options.packed:
        return sum(padded[i] for i in indices)
    return len(indices) * max(padded[i] for i in indices)


def _fill(indices: list[int], padded: list[int], options: PackingOptions) -> list[list[int]]:
    """First fit: ``indices`` come longest first; each goes to the first micro-batch that stays within the budget."""
    bins: list[list[int]] = []
    for index in indices:
        for members in bins:
            if _size([*members, index], padded, options) <= options.max_tokens:
                members.append(index)
                break
        else:
            bins.append([index])
    return bins


def _spread(plan: list[list[int]], count: int, padded: list[int], options: PackingOptions) -> None:
    """Brings ``plan`` to ``count`` micro-batches in place: halves the costliest that can be halved, else adds empty ones."""
    while len(plan) < count:
        divisible = [number for number, members in enumerate(plan) if len(members) > 1]
        if not divisible:
            plan.append([])
            continue
        number = max(divisible, key=lambda n: (sum(cost(padded[i], options) for i in plan[n]), -n))
        members = plan[number]
        first: list[int] = []
        second: list[int] = []
        for index in members:
            lighter = first if sum(padded[i] for i in first) <= sum(padded[i] for i in second) else second
            lighter.append(index)
        plan[number] = first
        plan.append(second)
