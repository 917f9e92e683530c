"""What handles of a GPU's memory say, and who makes them. Stand-ins for what torch answers on a GPU; shared memory with
real servers is in test_publish.py."""

import base64
import pickle
import threading
from io import BytesIO
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing import reductions

from dcpo_megatron.weights.publish import ipc
from dcpo_megatron.weights.publish.buckets import Bucket
from tests.weights.blocking_group import BlockingServer

UUIDS = {2: "c7a4ae62-8d9f-11ef-9a2b-000000000002"}


@pytest.fixture
def gpu(monkeypatch):
    """torch's side of CUDA IPC: a tensor's handle is a tuple with its GPU's index in it. Yields the tensors of which
    one was made."""
    made = []

    def reduce_tensor(tensor):
        made.append(tensor)
        arguments = (
            torch.Tensor,
            tensor.size(),
            tensor.stride(),
            0,
            torch.UntypedStorage,
            tensor.dtype,
            2,
            b"handle",
            64,
            0,
            b"counter",
            0,
            b"event",
            False,
            False,
        )
        return reductions.rebuild_cuda_tensor, arguments

    monkeypatch.setattr(reductions, "reduce_tensor", reduce_tensor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=UUIDS[index]))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    # What other code's tensors are pickled with: the registration that torch made when it was imported.
    monkeypatch.setitem(ForkingPickler._extra_reducers, torch.Tensor, reduce_tensor)
    return made


class Opened(pickle.Unpickler):
    """Reads handles as a server does, but opens none: gives what ``rebuild_cuda_tensor`` would be called with."""

    def find_class(self, module, name):
        return (lambda *arguments: arguments) if name == "rebuild_cuda_tensor" else super().find_class(module, name)


def opened(entry: str) -> list:
    return Opened(BytesIO(base64.b64decode(entry))).load()


def in_ranks(monkeypatch, world: int, work) -> list:
    """``work(rank)`` in ``world`` threads that stand in for ranks, with an all-gather among them."""
    here, meet, slots = threading.local(), threading.Barrier(world, timeout=3), [b""] * world

    def all_gather_on_host(payload):
        slots[here.rank] = payload
        meet.wait()
        found = list(slots)
        meet.wait()
        return found

    monkeypatch.setattr(ipc, "all_gather_on_host", all_gather_on_host)
    monkeypatch.setattr(
        ipc,
        "dist",
        SimpleNamespace(
            is_initialized=lambda: True,
            get_rank=lambda: here.rank,
            get_world_size=lambda: world,
            group=SimpleNamespace(WORLD=None),
        ),
    )
    found = [None] * world

    def run(rank):
        here.rank = rank
        found[rank] = work(rank)

    threads = [threading.Thread(target=run, args=[rank]) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def bucket() -> Bucket:
    return Bucket([("w", torch.zeros(3))], 12)


@pytest.fixture
def server():
    made = BlockingServer()
    yield made.server
    made.close()


def test_a_handle_names_its_gpu_by_uuid_and_other_pickles_stay_torchs_own(gpu, server):
    one = ipc.IpcTransport([server.url], torch.device("cuda", 2))
    one.connect(server, False, 5.0)
    ((name, arguments),) = opened(one.prepare(bucket())[0])
    assert name == "w" and arguments[6] == UUIDS[2]
    assert arguments[5] == torch.float32 and arguments[7] == b"handle" and len(arguments) == 15
    _, plain = Opened(BytesIO(ForkingPickler.dumps(bucket().tensors[0]))).load()
    assert plain[6] == 2


def test_only_ranks_on_a_servers_gpu_make_handles_and_none_when_no_server_takes_them(gpu, server, monkeypatch):
    def work(rank):
        one = ipc.IpcTransport([server.url], torch.device("cuda", 2))
        if rank == 0:
            one.connect(server, False, 5.0)
        first = one.prepare(bucket())
        if rank == 0:
            one.drop(server)
        second = one.prepare(bucket())
        if rank == 0:
            one.connect(server, False, 5.0)
            one.over()
        return first, second, one.prepare(bucket())

    ranks = in_ranks(monkeypatch, 3, work)
    assert ranks[0] == ranks[1] == ranks[2]
    first, second, third = ranks[0]
    assert len(opened(first[0])) == 1 and first[1:] == ["", ""]
    assert second == third == ["", "", ""]
    assert len(gpu) == 1
