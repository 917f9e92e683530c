"""Lays the responses of one minibatch out into micro-batches: a pure function of their lengths.

    packed: responses --(balance by attention cost)--> data-parallel ranks --(token budget, then balance again)-->
        micro-batches
    padded: responses --(sorted, cut where the longest changes)--> micro-batches of alike lengths --(balance)-->
        data-parallel ranks

A rank waits for the busiest rank, and a pipeline stage for the costliest micro-batch, so both are balanced by
:func:`cost`: longest first to the least loaded, then responses change places between the most loaded and the least
loaded for as long as that lowers the peak. Only alignment pads a packed row; padded rows hold neighbours in length.

Invariants of :func:`plan_micro_batches`, for any input:

- every index appears exactly once;
- every rank has the same number of micro-batches (pipeline stages and collectives would hang otherwise), a multiple of
  ``multiple_of``;
- a micro-batch is within the budget unless it holds a single response that is longer than the budget;
- no micro-batch is empty while another one of its rank holds two responses;
- the micro-batches of a rank come costliest first, so that ranks that meet inside a micro-batch (expert parallelism)
  meet at their likes;
- the plan depends on the arguments only, in whole numbers: every rank computes the same one.

Packed: no rank costs more than the mean over ranks plus the largest single response; the number of micro-batches is
what the fullest rank needs by best fit, longest first (below 2 x its tokens / budget + 1), rounded up to
``multiple_of``. Padded: the number is the smallest that the budget allows, and with that number no cut of the sorted
responses has a cheaper costliest micro-batch (rows x cost of the longest).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

# Of the least loaded groups, so many are tried as partners of the most loaded one, and for room.
_PARTNERS, _ROOMS = 64, 256
# Exchanges end where the peak is within this share of what is possible.
_NEAR = 1e-3


@dataclass(frozen=True)
class PackingOptions:
    """``max_tokens``: budget of a micro-batch in tokens (padding included). ``packed``: sequences end to end in one
    row; otherwise one a row, so that a micro-batch costs rows x longest. ``align``: every length is rounded up to a
    multiple of it. ``attention_length``: tokens at which a sequence's attention costs as much as the rest of its layers
    (about 6 x hidden width). ``row_align``: a row, of whatever it consists, is rounded up to a multiple of it."""

    max_tokens: int
    packed: bool = True
    align: int = 1
    attention_length: int = 8192
    row_align: int = 1

    def __post_init__(self):
        for name in ("max_tokens", "align", "attention_length", "row_align"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def capacity(self) -> int:
        """Tokens of the longest packed row that stays within ``max_tokens`` when it is rounded up to ``row_align``."""
        return self.max_tokens // self.row_align * self.row_align

    def aligned(self, length: int) -> int:
        """``length`` rounded up to a multiple of ``align``, in tokens."""
        return -(-length // self.align) * self.align


def plan_micro_batches(
    lengths: Sequence[int], data_parallel_size: int, options: PackingOptions, multiple_of: int = 1
) -> list[list[list[int]]]:
    """``plan[rank][micro_batch]`` = indices into ``lengths`` (tokens of prompt + response). See the module's text for
    what always holds.

    Raises:
        ValueError: a length below 1, or a size below 1.
    """
    if data_parallel_size < 1 or multiple_of < 1:
        raise ValueError(f"data_parallel_size={data_parallel_size} and multiple_of={multiple_of} must be at least 1")
    if any(length < 1 for length in lengths):
        raise ValueError("every sequence must have at least one token")
    sizes = [options.aligned(length) for length in lengths]
    if not options.packed:
        sizes = [-(-size // options.row_align) * options.row_align for size in sizes]
    # As cost(), times attention_length: whole numbers add up to the same sum in any order.
    costs = [size * (options.attention_length + size) for size in sizes]
    longest_first = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    if not options.packed:
        return _plan_padded(longest_first, data_parallel_size, multiple_of, sizes, costs, options.max_tokens)
    ranks = _least_loaded(longest_first, costs, data_parallel_size)
    _exchange(ranks, costs)
    ranks = [sorted(members, key=lambda i: (-sizes[i], i)) for members in ranks]
    fitted = [_best_fit(members, sizes, options.capacity) for members in ranks]
    count = max(1, *(len(micro_batches) for micro_batches in fitted))
    count = -(-count // multiple_of) * multiple_of
    return [_split(members, first, count, sizes, costs, options.capacity) for members, first in zip(ranks, fitted)]


def cost(length: int, options: PackingOptions) -> float:
    """Relative compute of one sequence of ``length`` tokens: linear layers plus attention, ``length * (1 + length /
    attention_length)``."""
    return length * (1.0 + length / options.attention_length)


# -- balance ---------------------------------------------------------------------------------------


def _least_loaded(order: list[int], costs: list[int], count: int) -> list[list[int]]:
    """Each of ``order`` goes to the group with the least cost so far (the longest-processing-time rule where ``order``
    is longest first)."""
    heap = [(0, group) for group in range(count)]
    groups: list[list[int]] = [[] for _ in range(count)]
    for index in order:
        load, group = heap[0]
        groups[group].append(index)
        heapq.heapreplace(heap, (load + costs[index], group))
    return groups


def _exchange(groups: list[list[int]], costs: list[int], sizes: list[int] | None = None, capacity: int = 0) -> None:
    """Lowers the costliest group in place: one response moves to, or changes places with one of, a lightly loaded
    group, until no such step helps.

    With ``sizes`` no group may come to hold more than ``capacity``. The highest load never rises, and no group is
    emptied.
    """
    loads = [sum(costs[i] for i in members) for members in groups]
    held = [sum(sizes[i] for i in members) for members in groups] if sizes else []
    largest = max((costs[i] for members in groups for i in members), default=0)
    goal = max(sum(loads) / len(groups), largest) * (1 + _NEAR)
    for _ in range(4 * len(groups) + 64):
        heavy = max(range(len(groups)), key=lambda g: (loads[g], -g))
        if loads[heavy] <= goal:
            return
        for light in heapq.nsmallest(_PARTNERS, range(len(groups)), key=lambda g: (loads[g], g)):
            room = capacity - held[light] if sizes else 0
            found = _best_swap(groups[heavy], groups[light], loads[heavy] - loads[light], costs, sizes, room)
            if found is None:
                continue
            given, taken = found
            for index, source, target in ((given, heavy, light), (taken, light, heavy)):
                if index is None:
                    continue
                groups[source].remove(index)
                groups[target].append(index)
                loads[source] -= costs[index]
                loads[target] += costs[index]
                if sizes:
                    held[source] -= sizes[index]
                    held[target] += sizes[index]
            break
        else:
            return


def _best_swap(
    heavy: list[int], light: list[int], gap: int, costs: list[int], sizes: list[int] | None, room: int
) -> tuple[int, int | None] | None:
    """What ``heavy`` should give and take (None: nothing) so that the loads, ``gap`` apart, come nearest to each other;
    None where nothing helps."""
    takes = [(0, -1), *sorted((costs[i], i) for i in light)]
    best, off = None, gap
    for given in heavy:
        # Half the gap should change sides; the nearest partners lie at the place found by bisection.
        place = bisect_left(takes, (costs[given] - gap / 2, -1))
        for value, taken in takes[max(0, place - 1) : place + 1]:
            distance = abs(2 * (costs[given] - value) - gap)
            if distance >= off:
                continue
            if sizes and sizes[given] - (sizes[taken] if taken >= 0 else 0) > room:
                continue
            best, off = (given, taken if taken >= 0 else None), distance
    return best


# -- packed rows: the micro-batches of one rank, from members that come longest first --------------


def _best_fit(members: list[int], sizes: list[int], capacity: int) -> list[list[int]]:
    """Each sequence goes where the least room is left over, into a new micro-batch where it fits nowhere."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, bin), ascending
    for index in members:
        place = bisect_left(rooms, (sizes[index], -1))
        if place < len(rooms):
            room, number = rooms.pop(place)
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(index)
        insort(rooms, (room - sizes[index], number))
    return bins


def _split(
    members: list[int], fitted: list[list[int]], count: int, sizes: list[int], costs: list[int], capacity: int
) -> list[list[int]]:
    """``count`` micro-batches of even cost within ``capacity``; ``fitted`` is a layout that is known to fit."""
    groups = _least_loaded_with_room(members, count, sizes, costs, capacity)
    if groups is None:
        groups = fitted
        _halve(groups, count, costs)
    _exchange(groups, costs, sizes, capacity)
    groups = [sorted(members, key=lambda i: (-costs[i], i)) for members in groups]
    return sorted(groups, key=lambda members: -sum(costs[i] for i in members))


def _least_loaded_with_room(
    members: list[int], count: int, sizes: list[int], costs: list[int], capacity: int
) -> list[list[int]] | None:
    """As :func:`_least_loaded`, into a group that has room; None where none of the few least loaded has any: then
    nearly all are full."""
    heap = [(0, 0, group) for group in range(count)]
    groups: list[list[int]] = [[] for _ in range(count)]
    for index in members:
        full = []
        while heap and heap[0][1] and heap[0][1] + sizes[index] > capacity:
            full.append(heapq.heappop(heap))
            if not heap or len(full) == _ROOMS:
                return None
        load, held, group = heap[0]
        groups[group].append(index)
        heapq.heapreplace(heap, (load + costs[index], held + sizes[index], group))
        for entry in full:
            heapq.heappush(heap, entry)
    return groups


def _halve(groups: list[list[int]], count: int, costs: list[int]) -> None:
    """Brings ``groups`` to ``count`` in place: halves the costliest that can be halved, else adds empty ones."""
    while len(groups) < count:
        divisible = [number for number, members in enumerate(groups) if len(members) > 1]
        if not divisible:
            groups.append([])
            continue
        number = max(divisible, key=lambda n: (sum(costs[i] for i in groups[n]), -n))
        groups[number], half = _least_loaded(groups[number], costs, 2)
        groups.append(half)


# -- padded rows -----------------------------------------------------------------------------------


def _plan_padded(
    order: list[int], ranks: int, multiple_of: int, sizes: list[int], costs: list[int], capacity: int
) -> list[list[list[int]]]:
    """Cuts ``order`` (longest first) into runs of neighbours in length, cheapest peak first, and deals the runs to the
    ranks."""
    count = -(-max(1, len(_runs(order, sizes, costs, capacity))) // ranks)
    count = -(-count // multiple_of) * multiple_of
    # The lowest ceiling on rows x cost of the longest with which the runs are no more than there are places.
    low, high = 1, max(1, len(order) * max(costs, default=0))
    while low < high:
        middle = (low + high) // 2
        if len(_runs(order, sizes, costs, capacity, middle)) <= ranks * count:
            high = middle
        else:
            low = middle + 1
    runs = _runs(order, sizes, costs, capacity, high)
    while len(runs) < ranks * count and any(len(run) > 1 for run in runs):
        number = max(range(len(runs)), key=lambda n: (len(runs[n]) > 1, len(runs[n]) * costs[runs[n][0]], -n))
        half = -(-len(runs[number]) // 2)
        runs[number : number + 1] = [runs[number][:half], runs[number][half:]]
    peaks = [len(run) * costs[run[0]] for run in runs]
    one = [1] * len(runs)
    dearest_first = sorted(range(len(runs)), key=lambda n: (-peaks[n], n))
    dealt = _least_loaded_with_room(dearest_first, ranks, one, peaks, count)
    assert dealt is not None  # there are no more runs than places
    _exchange(dealt, peaks, one, count)
    plan = [[runs[number] for number in sorted(numbers, key=lambda n: (-peaks[n], n))] for numbers in dealt]
    return [micro_batches + [[] for _ in range(count - len(micro_batches))] for micro_batches in plan]


def _runs(order: list[int], sizes: list[int], costs: list[int], capacity: int, ceiling: int = 0) -> list[list[int]]:
    """From the longest on, as many rows as the budget takes and, where it is given, a ``ceiling`` on rows x cost of the
    longest; at least one."""
    runs, start = [], 0
    while start < len(order):
        longest = order[start]
        rows = capacity // sizes[longest]
        if ceiling:
            rows = min(rows, ceiling // costs[longest])
        runs.append(order[start : start + max(1, rows)])
        start += len(runs[-1])
    return runs
