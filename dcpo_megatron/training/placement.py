"""Whether ranks that wait for each other in every layer share a host, as whoever started them has placed them.

parallel.tensor=2  ranks 0..3 on hosts  a a b b   groups (0 1) (2 3): each on one host
                                        a b a b   groups (0 1) (2 3): each on two, and every layer waits for the network
"""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from dcpo_megatron.distributed import all_gather_on_host
from dcpo_megatron.mcore.layout import RankPosition

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def placement_warning(position: RankPosition) -> str | None:
    """:func:`misplaced` of this run, from what every rank reports of itself. Collective over all ranks."""
    groups = {
        "tensor": position.tensor_group, "expert-tensor": position.expert_tensor_group,
        "context": position.context_group, "expert": position.expert_group,
    }  # fmt: skip
    mine = {
        "host": this_host(),
        "groups": {kind: dist.get_process_group_ranks(group) for kind, group in groups.items()},
    }
    everyone = [json.loads(text) for text in all_gather_on_host(json.dumps(mine).encode())]
    peers = {kind: {tuple(rank["groups"][kind]) for rank in everyone} for kind in groups}
    return misplaced([tuple(rank["host"]) for rank in everyone], peers)


def this_host() -> tuple[str, str]:
    """Its name, and what tells it from others of that name: as nccl tells hosts apart, NCCL_HOSTID included."""
    identity = os.environ.get("NCCL_HOSTID", "")
    if not identity and _BOOT.is_file():
        identity = f"{socket.gethostname()} {_BOOT.read_text().strip()}"
    return socket.gethostname(), identity or socket.gethostname()


def misplaced(hosts: Sequence[tuple[str, str]], groups: Mapping[str, Collection[tuple[int, ...]]]) -> str | None:
    """One sentence where a group of ``groups`` ("tensor", "context", "expert" ...: tuples of ranks) is on several hosts
    and need not be; None where all is well.

    ``hosts``: name and identity of each rank's host. Tensor-parallel groups are always to be on one host; the others
    where they would be if each host had consecutive ranks. The first kind that is not is said.
    """
    names, of = [name for name, _ in hosts], [identity for _, identity in hosts]
    counts = Counter(of)  # in the order of the hosts' first ranks
    in_blocks = [host for host, count in counts.items() for _ in range(count)]
    for kind, found in groups.items():
        spread = _spread(found, of)
        order = len(spread) > len(_spread(found, in_blocks))
        if not spread or not (order or kind == "tensor"):
            continue
        first = spread[0][0]
        other = next(rank for rank in spread[0] if of[rank] != of[first])
        said = (
            f"{len(spread)} of {len(found)} {kind}-parallel groups are on several hosts (rank {first} is on"
            f" {names[first]}, rank {other} of its group on {names[other]}), and every layer waits for the network: "
        )
        if order:
            return (
                said
                + "give each host consecutive ranks (Slurm: --distribution=block; a file of hosts: all ranks of one"
                " host, then the next's)"
            )
        size = len(spread[0])
        uneven = next(host for host, count in counts.items() if count % size)
        return (
            said
            + f"parallel.tensor={size} does not divide the {_ranks(counts[uneven])} of host {names[of.index(uneven)]}:"
            " lower it, and raise parallel.pipeline where the model needs the memory"
        )
    return None


def _spread(groups: Collection[tuple[int, ...]], of: Sequence[str]) -> list[tuple[int, ...]]:
    return sorted(group for group in groups if len({of[rank] for rank in group}) > 1)


def _ranks(count: int) -> str:
    return f"{count} ranks" if count > 1 else "one rank"
