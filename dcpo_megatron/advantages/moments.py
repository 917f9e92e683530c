"""Reward statistics per prompt, exact over ranks: (count, mean, M2, min, max) with M2 = sum (R - mean)^2.

Two sets of rewards merge without looking at the rewards again (Chan, Golub, LeVeque 1983):

    d = mean_b - mean_a,  n = n_a + n_b,  mean = mean_a + d n_b/n,  M2 = M2_a + M2_b + d^2 n_a n_b/n

Over a process group every rank brings its own prompts, or a part of a prompt's group, or nothing:

    rank 0: {x, y}      rank 0, x   [n mean M2 min max]     1. all-gather: input valid? how many ids, how many bytes?
    rank 1: {}          rank 0, y   [n mean M2 min max]     2. all-gather: the ids, as bytes
    rank 2: {y, z}      rank 2, y   [n mean M2 min max]     3. ONE all-reduce (SUM) of the table of rows
                        rank 2, z   [n mean M2 min max]     4. every rank merges equal ids, in the order of the rows

In the table each row is filled by the one rank that owns it and is zero on all others. A sum with zeros is exact
whatever the order of the reduction, so all ranks go on with the same bits. Step 1 makes an error on one rank an error
on all ranks.
"""

import array
import math
from itertools import chain
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Squares of rewards must not overflow, nor must sums of squares over any number of visits.
_LARGEST_REWARD = 1e100
# Rewards that differ by rounding only must not become advantages of size 1.
_CONSTANT_SIGMA = 1e-8


def sigma_of(variance: float, largest: float) -> float:
    """The standard deviation of rewards of which `largest` is the largest magnitude; 0 where it is rounding noise.

    Rewards are "constant" where sigma <= 1e-8 max(1, largest): [0.3, 0.1 + 0.2, 0.3] differ in the last bit only.
    """
    sigma = math.sqrt(variance)
    return sigma if sigma > _CONSTANT_SIGMA * max(1.0, largest) else 0.0


class Moments(NamedTuple):
    """Statistics of a non-empty set of rewards."""

    count: int  # type: ignore[assignment]  # tuple has a method of this name
    mean: float
    m2: float
    minimum: float
    maximum: float

    def variance(self, ddof: int) -> float:
        """M2/(count - ddof), 0 for count <= ddof; exactly 0 for a group of equal rewards, whose M2 is."""
        return 0.0 if self.count <= ddof else self.m2 / (self.count - ddof)

    def sigma(self, ddof: int) -> float:
        """Square root of `variance`, 0 for a constant group (see `sigma_of`)."""
        return sigma_of(self.variance(ddof), max(abs(self.minimum), abs(self.maximum)))


def moments_of(rewards: list[float]) -> Moments:
    """Statistics of a non-empty list; correctly rounded sums, so the order of the rewards does not matter."""
    minimum, maximum = min(rewards), max(rewards)
    if minimum == maximum:
        return Moments(len(rewards), minimum, 0.0, minimum, maximum)
    mean = math.fsum(rewards) / len(rewards)
    return Moments(len(rewards), mean, math.fsum((reward - mean) ** 2 for reward in rewards), minimum, maximum)


def merge_mean_m2(
    count_a: int, mean_a: float, m2_a: float, count_b: int, mean_b: float, m2_b: float
) -> tuple[int, float, float]:
    """(count, mean, M2) of two disjoint sets taken together (Chan, Golub, LeVeque 1983, eq. 2.1)."""
    count = count_a + count_b
    difference = mean_b - mean_a
    return count, mean_a + difference * (count_b / count), m2_a + m2_b + difference**2 * (count_a * count_b / count)


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Statistics of two disjoint sets taken together."""
    count, mean, m2 = merge_mean_m2(a.count, a.mean, a.m2, b.count, b.mean, b.m2)
    return Moments(count, mean, m2, min(a.minimum, b.minimum), max(a.maximum, b.maximum))


def local_moments(prompt_ids: list[str], rewards: Tensor) -> tuple[dict[str, Moments], list[float]]:
    """Statistics of each prompt among these responses, and the rewards as Python floats.

    Args:
        prompt_ids: `[n]`, the prompt of each response.
        rewards: `[n]`, one reward per response.

    Raises:
        ValueError: a missing id (None or ""), a reward that is not finite (or beyond 1e100), lengths that differ.
        TypeError: an id that is not a str, rewards that are not a tensor.
    """
    if not isinstance(rewards, Tensor):
        raise TypeError(f"rewards must be a tensor [n], got {type(rewards).__name__}")
    if isinstance(prompt_ids, str):
        raise TypeError("prompt_ids must be a list with one id per response, got one str")
    if rewards.dim() != 1 or len(prompt_ids) != len(rewards):
        raise ValueError(
            f"{len(prompt_ids)} prompt ids do not fit rewards of shape {tuple(rewards.shape)}; need one each [n]"
        )
    numbers = rewards.detach().to(device="cpu", dtype=torch.float64)
    values = numbers.tolist()
    groups: dict[str, list[float]] = {}
    for prompt_id, reward in zip(prompt_ids, values, strict=True):
        group = groups.get(prompt_id)
        if group is None:
            groups[prompt_id] = [reward]
        else:
            group.append(reward)
    if "" in groups or set(map(type, groups)) - {str} or not bool((numbers.abs() <= _LARGEST_REWARD).all()):
        _refuse(prompt_ids, values)
    return {prompt_id: moments_of(group) for prompt_id, group in groups.items()}, values


def _refuse(prompt_ids: list[str], values: list[float]) -> None:
    """Raises the error of the first response that cannot be."""
    for position, (prompt_id, reward) in enumerate(zip(prompt_ids, values, strict=True)):
        if prompt_id is None or prompt_id == "":
            # Filling in a default would make all prompts without an id share one history.
            raise ValueError(f"response {position} has no prompt id; give every prompt a stable, non-empty id")
        if not isinstance(prompt_id, str):
            raise TypeError(
                f"prompt id {prompt_id!r} of response {position} is a {type(prompt_id).__name__}; give a str"
            )
        if not abs(reward) <= _LARGEST_REWARD:
            raise ValueError(f"prompt {prompt_id!r} has the reward {reward}; rewards must be finite")


def exchange_moments(
    prompt_ids: list[str], rewards: Tensor, process_group: dist.ProcessGroup | None = None
) -> tuple[dict[str, Moments], list[float]]:
    """Statistics of each prompt over all ranks of `process_group`, and the local rewards as Python floats.

    Collective: every rank of the group calls it with its own responses, possibly none. See the module for the steps.

    Args:
        prompt_ids: `[n]`, the prompt of each local response.
        rewards: `[n]`, one reward per local response.
        process_group: None = this process only, even if torch.distributed is initialised. With nccl the current CUDA
            device carries the messages.

    Returns:
        (moments, values): the statistics of every prompt that any rank has, in the same order and bit for bit equal on
        all ranks; the local rewards.

    Raises:
        ValueError: invalid input on any rank (see `local_moments`): then EVERY rank raises, and names the rank at
            fault.
        TypeError: as `local_moments`, without a process group only.
    """
    if process_group is None:
        return local_moments(prompt_ids, rewards)

    error: Exception | None = None
    local: dict[str, Moments] = {}
    values: list[float] = []
    names = b""
    sizes: list[int] = []
    try:
        local, values = local_moments(prompt_ids, rewards)
        encoded = [prompt_id.encode("utf-8") for prompt_id in local]
        names, sizes = b"".join(encoded), [len(name) for name in encoded]
    except Exception as caught:  # whatever it is, the other ranks are about to wait for this one
        error = caught

    device = _message_device(process_group)
    world_size = dist.get_world_size(process_group)
    header = torch.tensor([0 if error is None else 1, len(sizes), len(names)], dtype=torch.int64, device=device)
    headers = [tuple(row.tolist()) for row in _all_gather(header, world_size, process_group)]
    at_fault = [rank for rank, (failed, _, _) in enumerate(headers) if failed]
    if error is not None:
        rank = dist.get_rank(process_group)
        raise ValueError(f"rank {rank} of the process group (this one) has invalid rewards: {error}") from error
    if at_fault:
        raise ValueError(
            f"rank {at_fault[0]} of the process group has invalid rewards; its own error message says which"
        )

    all_ids = _gather_ids(names, sizes, [(count, size) for _, count, size in headers], device, process_group)
    rows = _reduce_rows(list(local.values()), [len(ids) for ids in all_ids], device, process_group)
    merged: dict[str, Moments] = {}
    for prompt_id, row in zip((prompt_id for ids in all_ids for prompt_id in ids), rows, strict=True):
        merged[prompt_id] = merge_moments(merged[prompt_id], row) if prompt_id in merged else row
    return merged, values


def _message_device(process_group: dist.ProcessGroup) -> torch.device:
    # A mixed group ("cpu:gloo,cuda:nccl") takes CPU tensors; only a pure nccl group does not.
    if dist.get_backend(process_group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _all_gather(tensor: Tensor, world_size: int, process_group: dist.ProcessGroup) -> list[Tensor]:
    gathered = [torch.empty_like(tensor) for _ in range(world_size)]
    dist.all_gather(gathered, tensor, group=process_group)
    return gathered


def _gather_ids(
    names: bytes,
    sizes: list[int],
    extents: list[tuple[int, int]],
    device: torch.device,
    process_group: dist.ProcessGroup,
) -> list[list[str]]:
    """The ids of every rank, by rank. A message is: byte lengths of the ids (int64 of the host), their utf-8 bytes,
    padding."""
    longest = max(8 * count + size for count, size in extents)
    if longest == 0:
        return [[] for _ in extents]
    message = torch.zeros(longest, dtype=torch.uint8)
    payload = array.array("q", sizes).tobytes() + names
    if payload:
        message[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    all_ids = []
    for (count, _), received in zip(extents, _all_gather(message.to(device), len(extents), process_group), strict=True):
        data = received.cpu().numpy().tobytes()
        ids, start = [], 8 * count
        for size in array.array("q", data[:start]):
            ids.append(data[start : start + size].decode("utf-8"))
            start += size
        all_ids.append(ids)
    return all_ids


def _reduce_rows(
    local: list[Moments], counts: list[int], device: torch.device, process_group: dist.ProcessGroup
) -> list[Moments]:
    """The rows of all ranks, in rank order; `counts[r]` of them belong to rank r."""
    if sum(counts) == 0:
        return []
    table = torch.zeros(sum(counts), len(Moments._fields), dtype=torch.float64)
    if local:
        first = sum(counts[: dist.get_rank(process_group)])
        rows = array.array("d", chain.from_iterable(local))
        table[first : first + len(local)] = torch.frombuffer(rows, dtype=torch.float64).view(len(local), -1)
    table = table.to(device)
    dist.all_reduce(table, op=dist.ReduceOp.SUM, group=process_group)
    count, *others = table.T.tolist()
    return [Moments(*row) for row in zip(map(int, count), *others, strict=True)]
