"""GPUs that ranks and servers have in common: refused where it is an accident, and handed to and fro where it is meant
(``publish.colocated``).

servers sample                                  ranks train
weights, cache, graphs on the GPU               released
optimizer on the host, gradients freed   <-->   all of it on the GPU
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from dcpo_megatron.config.schema import ConfigError
from dcpo_megatron.distributed import all_gather_on_host, host_group
from dcpo_megatron.mcore.offload import OptimizerOffload
from dcpo_megatron.mcore.platform import Platform
from dcpo_megatron.mcore.step import PolicyModel
from dcpo_megatron.network import is_here


class SharedGpu:
    """This rank's half of a GPU that it shares with servers."""

    def __init__(self, policy: PolicyModel):
        self._offload = OptimizerOffload(policy)

    def make_room(self) -> None:
        """Before servers take their memory back: leaves them all that a forward pass does not need. Collective: returns
        when every rank has."""
        self._offload.to_host()
        torch.cuda.empty_cache()
        dist.barrier(group=host_group())

    def take_back(self) -> None:
        """After servers have released theirs."""
        self._offload.to_device()


def gpu_of(platform: Platform) -> str | None:
    """The uuid of this rank's GPU, as nvidia-smi tells it; None on a CPU."""
    return None if platform.is_cpu else f"GPU-{torch.cuda.get_device_properties(platform.device).uuid}"


def check_servers_gpus(servers: Mapping[str, Sequence[str] | None], gpu: str | None, shared: bool) -> list[str]:
    """Holds the servers' GPUs against the ranks'. Collective.

    Args:
        servers: address -> uuids of its GPUs, None where they are not known.
        gpu: this rank's (:func:`gpu_of`).
        shared: servers are meant to be on the ranks' GPUs.

    Returns:
        sentences about servers on the ranks' hosts whose GPUs are not known.

    Raises:
        ConfigError: the same on every rank: GPUs are shared and should not be, or the other way round.
    """
    unknown = [url for url, gpus in servers.items() if gpus is None]
    mine = json.dumps([gpu, [url for url in unknown if gpu is not None and is_here(urlsplit(url).hostname or "")]])
    answers = [json.loads(answer) for answer in all_gather_on_host(mine.encode())]
    rank_of = {uuid: rank for rank, (uuid, _) in enumerate(answers) if uuid is not None}
    if not rank_of:
        return []
    problems = []
    for url, gpus in servers.items():
        common = [uuid for uuid in gpus or () if uuid in rank_of]
        if common and not shared:
            whose = ", ".join(f"{uuid} is rank {rank_of[uuid]}'s too" for uuid in common)
            problems.append(
                f"{url} is on GPUs of this run ({whose}): give the servers others (dcpo serve --gpus 4-7) and the ranks"
                " the rest (CUDA_VISIBLE_DEVICES=0,1,2,3), or share them on purpose (publish.colocated=true"
                " publish.mode=ipc, dcpo serve --colocated)"
            )
        if shared and gpus is not None and len(common) < len(gpus):
            alone = ", ".join(uuid for uuid in gpus if uuid not in rank_of)
            problems.append(
                f"publish.mode=ipc hands weights over on the GPU that both have, and {url} has GPUs that no rank has"
                f" ({alone}): start servers and ranks on the same ones, or set publish.mode=distributed"
                " publish.colocated=false"
            )
    if problems:
        raise ConfigError("\n".join(problems))
    here = sorted({url for _, urls in answers for url in urls})
    wanted = "are the ranks'" if shared else "are not the ranks'"
    return [
        f"which GPUs {url} has is not known: see that they {wanted}, or name its file of `dcpo serve` in servers.file,"
        " which tells"
        for url in here
    ]
