"""Weights through a process group: one group for each server, of this rank (0) and the server's tensor-parallel ranks (1, 2, ...).

    POST /init_weights_update_group  ---->  server joins     |   TCPStore, PrefixStore(name), stand-alone group, as SGLang makes its own
    POST /update_weights_from_distributed {names, ...}  ->   |   one broadcast a tensor; the server answers when it has loaded them

A group for each server and not one for all: where a server dies or stops in the middle of a broadcast, those behind it in the tree would wait for it until their own
deadline of half an hour, which cannot be set. A group is kept as long as its server lives.
"""

from __future__ import annotations

import datetime
import socket
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from dcpo_megatron.rollout.protocol import RolloutError
from dcpo_megatron.rollout.server import Server, ServerError
from dcpo_megatron.weights.publish.buckets import Bucket

_LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")


@dataclass
class _Group:
    name: str
    group: dist.ProcessGroup
    store: dist.TCPStore  # the server's ranks speak to it as long as the group lives


class ProcessGroupTransport:
    """Sends buckets from this rank; see the module. ``timeout``: seconds of one broadcast."""

    staged = False

    def __init__(self, backend: str, device: torch.device, address: str | None, timeout: float):
        self.backend, self.device, self.address, self.timeout = backend, device, address, timeout
        self._groups: dict[str, _Group] = {}

    def prepare(self, bucket: Bucket) -> None:
        """Nothing: only rank 0 sends."""

    @contextmanager
    def connecting(self):
        """Around :meth:`connect`. A default group that is bound to a device would make NCCL split its communicator, on which this rank then hangs alone."""
        default = c10d._get_default_group() if dist.is_initialized() else None
        bound = getattr(default, "bound_device_id", None)
        if bound is not None:
            default.bound_device_id = None
        try:
            yield
        finally:
            if bound is not None:
                default.bound_device_id = bound

    def connect(self, server: Server, known: bool, seconds: float) -> None:
        """Joins a group with ``server``, or keeps the one it has if the server is still the one that joined it (``known``).

        Raises:
            RolloutError: a server of several pipeline stages or data-parallel copies, or one that did not join within ``seconds``.
        """
        if known and server.url in self._groups:
            return
        self.drop(server)
        ranks = _ranks(server)
        name = f"dcpo-weights-{zlib.crc32(server.url.encode()):08x}"
        try:  # what a trainer that was killed has left behind
            server.post("/destroy_weights_update_group", {"group_name": name}, timeout=seconds)
        except ServerError as error:
            if error.status != 400:
                raise
        address = self.address or _own_address(server.url)
        limit = datetime.timedelta(seconds=min(seconds, self.timeout))
        try:
            store = dist.TCPStore(address, 0, 1 + ranks, is_master=True, wait_for_workers=False, timeout=limit)
        except (RuntimeError, OSError) as error:
            raise RolloutError(f"no rendezvous store at {address}: {error}; set publish.address") from error
        body = {
            "master_address": address, "master_port": store.port, "rank_offset": 1, "world_size": 1 + ranks, "group_name": name, "backend": self.backend,
        }  # fmt: skip
        with ThreadPoolExecutor(1) as thread:
            asked = thread.submit(server.post, "/init_weights_update_group", body, timeout=limit.total_seconds() + 1)
            try:
                group, _ = c10d._new_process_group_helper(
                    1 + ranks, 0, [], c10d.Backend(self.backend), dist.PrefixStore(name, store), group_name=name, timeout=limit
                )  # fmt: skip
            except RuntimeError as error:
                # The server's own words come first, if it has any.
                asked.result()
                raise RolloutError(
                    f"{server.url} did not join the group within {limit.total_seconds():.0f} s ({error}): can it reach {address}? set publish.address"
                ) from error
            c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(1 + ranks)}
            self._groups[server.url] = _Group(name, group, store)
            asked.result()

    def send(self, server: Server, bucket: Bucket, payload: None, seconds: float) -> None:
        """One bucket to one server; returns when the server has loaded it. Raises ServerError or RuntimeError; :meth:`drop` the server then."""
        held = self._groups[server.url]
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # the current device is a thread's own
        works = [
            dist.broadcast(tensor.to(self.device), src=0, group=held.group, async_op=True)
            for _, tensor in bucket.tensors
        ]
        # It answers after it received everything, or refuses before: no second wait is needed for the broadcasts' sake.
        body = {
            "names": bucket.names, "dtypes": bucket.dtypes, "shapes": bucket.shapes, "group_name": held.name, "flush_cache": False,
        }  # fmt: skip
        server.post("/update_weights_from_distributed", body, timeout=seconds)
        for work in works:
            work.wait()

    def drop(self, server: Server) -> None:
        """Lets go of the group with ``server``, whatever state it is in; does not wait."""
        held = self._groups.pop(server.url, None)
        if held is None:
            return
        if self.backend == "nccl":
            held.group.abort()
        dist.destroy_process_group(held.group)
        # Broadcasts under way end at their own deadline, and the group's destructor waits for them.
        threading.Thread(target=_outlive, args=[held], daemon=True).start()

    def committed(self) -> None:
        """Nothing is left behind that could be removed."""

    def close(self) -> None:
        """Leaves all groups."""
        for held in list(self._groups.values()):
            dist.destroy_process_group(held.group)
        self._groups.clear()


def _outlive(held: _Group) -> None:
    del held


def _ranks(server: Server) -> int:
    """How many ranks of ``server`` receive weights."""
    info = server.get("/server_info")
    stages, copies = int(info.get("pp_size") or 1), int(info.get("dp_size") or 1)
    if stages > 1 or (copies > 1 and not info.get("enable_dp_attention")):
        raise RolloutError(
            f"{server.url} has {stages} pipeline stages and {copies} data-parallel copies, SGLang takes weights from a group with one of each: "
            "start several servers instead, or publish by disk"
        )
    return int(info.get("tp_size") or 1)


def _own_address(url: str) -> str:
    """The address that this host has for the server at ``url``."""
    parts = urlsplit(url)
    if parts.hostname in _LOOPBACK:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))  # sends nothing
        return probe.getsockname()[0]
