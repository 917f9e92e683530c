"""Small collectives that torch.distributed offers with pickle only, done with plain bytes."""

from __future__ import annotations

import torch
import torch.distributed as dist


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
