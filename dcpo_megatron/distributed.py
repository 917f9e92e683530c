"""What ranks tell each other on the host: through a gloo group, also where the default group is nccl's.

A collective of nccl spins on the GPU until the slowest rank has come. Where servers sample on that GPU it takes their
time, and what ranks meet about between two steps (counts, sentences, bytes) is on the host anyway. On a CPU the default
group is this group.
"""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist

CPU = torch.device("cpu")
# (default group, its gloo companion): a new default group gets a new one.
_companion: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None


def make_host_group(timeout: datetime.timedelta) -> None:
    """Makes the gloo companion of the default group, where that is not gloo's own and has none. Collective over all
    ranks."""
    global _companion
    if dist.get_backend() != "gloo" and host_group() is dist.group.WORLD:
        _companion = (dist.group.WORLD, dist.new_group(backend="gloo", timeout=timeout))


def forget_host_group() -> None:
    """When the groups are destroyed: what is held here would keep its threads and sockets."""
    global _companion
    _companion = None


def host_group() -> dist.ProcessGroup:
    """All ranks, for tensors on the host: the companion where there is one, otherwise the default group."""
    world = dist.group.WORLD
    return _companion[1] if _companion is not None and _companion[0] is world else world


def all_reduce_on_host(values: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """``values`` (on the host) reduced over all ranks, in place; returned too."""
    dist.all_reduce(values, op=op, group=host_group())
    return values


def all_gather_on_host(payload: bytes) -> list[bytes]:
    """Every rank's bytes, in rank order."""
    return all_gather_bytes(payload, host_group(), CPU)


def gather_on_first(payload: bytes) -> list[bytes]:
    """Every rank's bytes on rank 0, in rank order; nothing elsewhere."""
    rank, world = dist.get_rank(), dist.get_world_size()
    all_sizes = all_reduce_on_host(torch.tensor([len(payload) if place == rank else 0 for place in range(world)]))
    from_each = all_sizes.tolist() if rank == 0 else [0] * world
    received = torch.empty(sum(from_each), dtype=torch.uint8)
    sent = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    dist.all_to_all_single(received, sent, from_each, [len(payload)] + [0] * (world - 1), group=host_group())
    return [part.numpy().tobytes() for part in received.split(from_each)] if rank == 0 else []


def all_gather_bytes(payload: bytes, group: dist.ProcessGroup, device: torch.device) -> list[bytes]:
    """Every rank's bytes, in rank order, without pickle: sizes first, then one padded all-gather."""
    world = dist.get_world_size(group)
    if world == 1:
        return [payload]
    size = torch.tensor([len(payload)], device=device)
    sizes = [torch.zeros_like(size) for _ in range(world)]
    dist.all_gather(sizes, size, group=group)
    longest = max(1, *(int(s) for s in sizes))
    mine = torch.zeros(longest, dtype=torch.uint8, device=device)
    if payload:
        mine[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(device)
    everyone = [torch.zeros_like(mine) for _ in range(world)]
    dist.all_gather(everyone, mine, group=group)
    return [bytes(row[: int(s)].cpu().numpy().tobytes()) for row, s in zip(everyone, sizes, strict=True)]
