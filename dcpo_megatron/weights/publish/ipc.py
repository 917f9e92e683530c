"""Weights handed over in place, to servers on the same host: CUDA IPC handles on a GPU, shared memory on a CPU.

    every rank: pickled handles of its copy of the bucket  --all-gather-->  rank 0: POST /update_weights_from_tensor, one entry for each tensor-parallel rank

Server ``i`` of ``tp`` GPUs takes entries ``i * tp ...``: servers are listed in the order of the GPUs they share with the training ranks. The handles are pickles that the
server reads with its own list of allowed names; nothing pickled is read here. No bytes of weights pass through HTTP.
"""

from __future__ import annotations

import base64
import io
from multiprocessing.reduction import ForkingPickler

import torch
import torch.distributed as dist
import torch.multiprocessing as torch_multiprocessing

from dcpo_megatron.mcore.collectives import all_gather_bytes
from dcpo_megatron.rollout.protocol import RolloutError
from dcpo_megatron.rollout.server import Server
from dcpo_megatron.weights.publish.buckets import Bucket


class IpcTransport:
    """Args:
    urls: of all servers, in the order of their GPUs.
    device: this rank's.
    """

    staged = False

    def __init__(self, urls: list[str], device: torch.device):
        self.urls, self.device = urls, device
        self._first: dict[str, tuple[int, int]] = {}

    def prepare(self, bucket: Bucket) -> list[str]:
        """This rank's bucket as handles, of all ranks in their order. Collective; also keeps a rank from dropping a bucket before it was loaded."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.ipc_collect()
            tensors = bucket.tensors
        else:
            # A file in shared memory is found by its name; the descriptor of another process is not.
            torch_multiprocessing.set_sharing_strategy("file_system")
            # A copy: share_memory_ would move the model's own parameters.
            tensors = [(name, tensor.clone().share_memory_()) for name, tensor in bucket.tensors]
            bucket.tensors = tensors
        written = io.BytesIO()
        ForkingPickler(written).dump(tensors)
        mine = base64.b64encode(written.getvalue())
        if not dist.is_initialized():
            return [mine.decode()]
        return [entry.decode() for entry in all_gather_bytes(mine, dist.group.WORLD, self.device)]

    def connect(self, server: Server, known: bool, seconds: float) -> None:
        """Finds out which handles are the server's. Raises RolloutError where servers and training ranks do not lie on the same GPUs."""
        if known and server.url in self._first:
            return
        tp = int(server.get("/server_info", timeout=seconds).get("tp_size") or 1)
        first, world = self.urls.index(server.url) * tp, dist.get_world_size() if dist.is_initialized() else 1
        if self.device.type != "cuda":
            first %= world  # any process's shared memory will do
        if first + tp > world:
            raise RolloutError(
                f"{server.url} has {tp} tensor-parallel ranks from GPU {first} on, but there are {world} training ranks: with publish.mode=ipc every GPU of a "
                "server needs a training rank; use publish.mode=distributed"
            )
        self._first[server.url] = (first, tp)

    def send(self, server: Server, bucket: Bucket, payload: list[str], seconds: float) -> None:
        """One bucket to one server. Raises ServerError."""
        first, tp = self._first[server.url]
        body = {"serialized_named_tensors": payload[first : first + tp], "flush_cache": False}
        server.post("/update_weights_from_tensor", body, timeout=seconds)

    def drop(self, server: Server) -> None:
        """What is known of a server is asked anew."""
        self._first.pop(server.url, None)

    def committed(self) -> None:
        """Frees memory that servers have let go of."""
        if self.device.type == "cuda":
            torch.cuda.ipc_collect()

    def close(self) -> None:
        """Nothing is held."""
