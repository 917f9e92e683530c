"""Weights handed over in place, to servers on the same host: CUDA IPC handles on a GPU, shared memory on a CPU.

    ranks on a server's GPU: pickled handles of their copy of the bucket
        --all-gather-->  rank 0: POST /update_weights_from_tensor, one entry a tensor-parallel rank

Server ``i`` of ``tp`` GPUs takes entries ``i * tp ...``: servers are listed in the order of the GPUs they share with
the training ranks. The handles are pickles that the server reads with its own list of allowed names; nothing pickled is
read here. No bytes of weights pass through HTTP.

A handle keeps its memory until somebody has opened it, so only ranks make one whose server will. It names its GPU by
uuid, as SGLang's own senders do: with another CUDA_VISIBLE_DEVICES the index is another GPU's.
"""

from __future__ import annotations

import base64
import io
import json
from multiprocessing.reduction import ForkingPickler

import torch
import torch.distributed as dist
import torch.multiprocessing as torch_multiprocessing
from torch.multiprocessing import reductions

from dcpo_megatron.distributed import all_gather_on_host
from dcpo_megatron.rollout.protocol import RolloutError
from dcpo_megatron.rollout.server import Server
from dcpo_megatron.weights.publish.buckets import Bucket
from dcpo_megatron.weights.publish.transport import Transport

# Of the device, among the arguments of torch's rebuild_cuda_tensor.
_DEVICE = 6


class IpcTransport(Transport):
    """Args:
    urls: of all servers, in the order of their GPUs.
    device: this rank's.
    """

    one_sender = False  # each rank hands over its own copy

    def __init__(self, urls: list[str], device: torch.device):
        self.urls, self.device = urls, device
        self._first: dict[str, tuple[int, int]] = {}

    def prepare(self, bucket: Bucket) -> list[str]:
        """The bucket as handles, of all ranks in their order, "" of one that no server shares a GPU with. Collective;
        also keeps a rank from dropping a bucket before it was loaded."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        wanted = sorted({rank for first, tp in self._first.values() for rank in range(first, first + tp)})
        # Rank 0 alone speaks to servers.
        wanted = json.loads(self._gather(json.dumps(wanted).encode() if rank == 0 else b"")[0])
        mine = base64.b64encode(self._handles(bucket)) if rank in wanted else b""
        return [entry.decode() for entry in self._gather(mine)]

    def _gather(self, mine: bytes) -> list[bytes]:
        return all_gather_on_host(mine) if dist.is_initialized() else [mine]

    def _handles(self, bucket: Bucket) -> bytes:
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
        pickler = ForkingPickler(written)
        # This pickler's own: everybody else's tensors are pickled as torch does it.
        pickler.dispatch_table = {**pickler.dispatch_table, torch.Tensor: _reduce}
        pickler.dump(tensors)
        return written.getvalue()

    def connect(self, server: Server, known: bool, seconds: float) -> None:
        """Finds out which handles are the server's. Raises RolloutError where servers and training ranks do not lie on
        the same GPUs."""
        tp = int(server.get("/server_info", timeout=seconds).get("tp_size") or 1)
        first, world = self.urls.index(server.url) * tp, dist.get_world_size() if dist.is_initialized() else 1
        if self.device.type != "cuda":
            first %= world  # any process's shared memory will do
        if first + tp > world:
            raise RolloutError(
                f"{server.url} has {tp} tensor-parallel ranks from GPU {first} on, but there are {world} training"
                " ranks: with publish.mode=ipc every GPU of a server needs a training rank; use"
                " publish.mode=distributed"
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

    def over(self) -> None:
        """No server takes what is left of this publication's walk; all are asked anew by the next."""
        self._first.clear()

    def committed(self) -> None:
        """Frees memory that servers have let go of."""
        if self.device.type == "cuda":
            torch.cuda.ipc_collect()


def _reduce(tensor: torch.Tensor) -> tuple:
    """torch's own handle; for a GPU's memory with the GPU's uuid in the place of its index (SGLang's
    ``utils/patch_torch.py`` takes either)."""
    rebuild, arguments = reductions.reduce_tensor(tensor)
    if rebuild is reductions.rebuild_cuda_tensor:
        uuid = str(torch.cuda.get_device_properties(arguments[_DEVICE]).uuid)
        arguments = (*arguments[:_DEVICE], uuid, *arguments[_DEVICE + 1 :])
    return rebuild, arguments
