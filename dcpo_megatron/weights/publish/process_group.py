"""Weights through a process group: one group for each server, of this rank (0) and the server's tensor-parallel ranks
(1, 2, ...).

    POST /init_weights_update_group         ---->  server joins       |  TCPStore, PrefixStore(name), stand-alone group,
                                                                      |  as SGLang makes its own
    POST /update_weights_from_distributed   ---->  server broadcasts  |  one broadcast a tensor; the server answers when
                                                                      |  it has loaded them
         at the same time, in a thread: our broadcasts                |  NCCL's first one blocks until the server has
                                                                      |  made its side, on that POST
         both over, one failed, or the deadline: abort the group, evict

A group for each server and not one for all: where a server dies or stops in the middle of a broadcast, those behind it
in the tree would wait for it until their own deadline of half an hour, which cannot be set. A group is kept as long as
its server lives.

Whatever can block in C++ (joining, broadcasts, taking a group down) runs in a thread that nobody joins, and the wait
for it has a deadline.
"""

from __future__ import annotations

import datetime
import threading
import zlib
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from dcpo_megatron import network
from dcpo_megatron.rollout.addresses import bare, in_url, own_address
from dcpo_megatron.rollout.protocol import RolloutError
from dcpo_megatron.rollout.server import Server, ServerError
from dcpo_megatron.threads import beside
from dcpo_megatron.weights.publish import nccl
from dcpo_megatron.weights.publish.buckets import Bucket
from dcpo_megatron.weights.publish.transport import Transport

# How long the server's own words are waited for after our side failed, and both sides' leaving.
_WORDS_SECONDS, _FAREWELL_SECONDS = 2.0, 5.0


_beside = partial(beside, name="weights")


@dataclass
class _Group:
    server: Server
    name: str
    group: dist.ProcessGroup | _Gloo
    store: dist.TCPStore  # the server's ranks speak to it as long as the group lives
    doubt: str  # what may be the reason if it fails
    gone: threading.Event = field(default_factory=threading.Event)  # its name can be used again


class ProcessGroupTransport(Transport):
    """Sends buckets from this rank; see the module. ``timeout``: seconds of one broadcast."""

    def __init__(self, backend: str, device: torch.device, address: str | None, timeout: float):
        self.backend, self.device, self.address, self.timeout = backend, device, address, timeout
        self._groups: dict[str, _Group] = {}
        self._leaving: dict[str, threading.Event] = {}
        # gloo has deadlines of its own, and no abort.
        self._aborts = backend != "gloo"
        if backend == "nccl":
            nccl.bound_waiting(timeout)

    @contextmanager
    def connecting(self):
        """Around :meth:`connect`. A default group that is bound to a device would make NCCL split its communicator, on
        which this rank then hangs alone."""
        default = c10d._get_default_group() if dist.is_initialized() else None
        bound = getattr(default, "bound_device_id", None)
        if default is not None and bound is not None:
            default.bound_device_id = None
        try:
            with nccl.errors_stay_here() if self._aborts else nullcontext():
                yield
        finally:
            if default is not None and bound is not None:
                default.bound_device_id = bound

    def connect(self, server: Server, known: bool, seconds: float) -> None:
        """Joins a group with ``server``, or keeps the one it has if the server is still the one that joined it
        (``known``).

        Raises:
            RolloutError: a server of several pipeline stages or data-parallel copies, with another NCCL, whose name
                does not resolve, or one that did not join within ``seconds``.
        """
        if known and server.url in self._groups:
            return
        self.drop(server)
        info = server.get("/server_info", timeout=seconds)
        ranks = _ranks(server, info)
        doubt = nccl.compare(server, info, seconds) if self.backend == "nccl" else ""
        name = f"dcpo-weights-{zlib.crc32(server.url.encode()):08x}"
        try:  # what a trainer that was killed has left behind
            server.post("/destroy_weights_update_group", {"group_name": name}, timeout=seconds)
        except ServerError as error:
            if error.status != 400:
                raise
        limit = min(seconds, self.timeout)
        if server.url in self._leaving and not self._leaving[server.url].wait(limit):
            raise RolloutError(
                f"the group that {server.url} was in could not be taken down within {limit:.0f} s: start the run again,"
                " or set publish.mode=disk"
            )
        address = self.address or _own_address(server.url)
        try:
            store = dist.TCPStore(
                bare(address),
                0,
                1 + ranks,
                is_master=True,
                wait_for_workers=False,
                timeout=datetime.timedelta(seconds=limit),
            )
        except (RuntimeError, OSError) as error:
            raise RolloutError(f"no rendezvous store at {address}: {error}; set publish.address") from error
        body = {
            "master_address": in_url(address), "master_port": store.port, "rank_offset": 1, "world_size": 1 + ranks,
            "group_name": name, "backend": self.backend,
        }  # fmt: skip

        def join() -> None:
            if not self._aborts:
                group = _Gloo(name, store, 1 + ranks, _listening(address, server.url), limit)
                self._groups[server.url] = _Group(server, name, group, store, doubt)
                return
            # Our own deadlines end it long before its own would.
            timeout = datetime.timedelta(seconds=2 * self.timeout + 60)
            group, _ = c10d._new_process_group_helper(
                1 + ranks, 0, [], c10d.Backend(self.backend), dist.PrefixStore(name, store),
                group_name=name,  # type: ignore[arg-type]  # newer versions of torch have a NewType of str
                timeout=timeout,
                backend_options=nccl.options(timeout) if self.backend == "nccl" else None,
            )  # fmt: skip
            c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(1 + ranks)}
            self._groups[server.url] = _Group(server, name, group, store, doubt)

        asked = _beside(lambda: server.post("/init_weights_update_group", body, timeout=limit))
        _both(
            asked,
            _beside(join),
            limit,
            f"{server.url} did not join the group within {limit:.0f} s: can it reach {address}? set publish.address",
        )

    def send(self, server: Server, bucket: Bucket, payload: None, seconds: float) -> None:
        """One bucket to one server; returns when the server has loaded it. Raises ServerError or RolloutError;
        :meth:`drop` the server then."""
        held = self._groups[server.url]
        body = {
            "names": bucket.names, "dtypes": bucket.dtypes, "shapes": bucket.shapes, "group_name": held.name,
            "flush_cache": False,
        }  # fmt: skip
        asked = _beside(lambda: server.post("/update_weights_from_distributed", body, timeout=seconds))
        _both(
            asked,
            _beside(lambda: self._broadcast(held.group, bucket)),
            seconds,
            f"the group with {server.url} broke off a bucket of {bucket.bytes} bytes{held.doubt}",
        )

    def _broadcast(self, group: dist.ProcessGroup | _Gloo, bucket: Bucket) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # the current device is a thread's own
        send = (
            group.broadcast if isinstance(group, _Gloo) else partial(dist.broadcast, src=0, group=group, async_op=True)
        )
        works = [send(tensor.to(self.device)) for _, tensor in bucket.tensors]
        for work in works:
            work.wait()

    def drop(self, server: Server) -> None:
        """Lets go of the group with ``server``, whatever state it is in; does not wait."""
        held = self._groups.pop(server.url, None)
        if held is not None:
            self._leaving[server.url] = held.gone
            threading.Thread(target=_take_down, args=[held, self._aborts], daemon=True).start()

    def close(self) -> None:
        """Leaves all groups; waits for it some seconds at most."""
        leaving = []
        for held in list(self._groups.values()):
            body = {"group_name": held.name}
            # Both sides at the same time: NCCL's destroy can wait for the other's.
            leaving.append(
                _beside(partial(held.server.post, "/destroy_weights_update_group", body, timeout=_FAREWELL_SECONDS))
            )
            leaving.append(_beside(partial(_take_down, held, abort=False)))
        self._groups.clear()
        wait(leaving, timeout=_FAREWELL_SECONDS)


class _Gloo:
    """A group over gloo whose rank 0 listens at ``address``. Made as torch makes it (under these prefixes), but that
    torch takes the first address of an interface
    that the environment names, or what this host's name resolves to."""

    def __init__(self, name: str, store: dist.Store, size: int, address: str, seconds: float):
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stub lacks it
        options._timeout = datetime.timedelta(seconds=seconds)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        for prefix in (name, f"{name}/", "cpu/"):
            store = dist.PrefixStore(prefix, store)
        self._backend = dist.ProcessGroupGloo(store, 0, size, options)

    def broadcast(self, tensor: torch.Tensor) -> dist.Work:
        # torch's stub has a backend's life, not its operations.
        return self._backend.broadcast([tensor], dist.BroadcastOptions())  # type: ignore[attr-defined]


def _both(asked: Future, done: Future, seconds: float, what: str) -> None:
    """Waits until the server has answered and our part is done. Raises what the server says; RolloutError (``what``)
    where only our part failed, or nothing came."""
    wait([asked, done], timeout=seconds + 1, return_when=FIRST_EXCEPTION)
    if done.done() and done.exception() is not None:
        wait([asked], timeout=_WORDS_SECONDS)
    if asked.done():
        asked.result()
    if done.done() and done.exception() is not None:
        raise RolloutError(f"{what} ({' '.join(str(done.exception()).split())[:500]})") from done.exception()
    if not (asked.done() and done.done()):
        raise RolloutError(f"{what} (no end within {seconds:.0f} s)")


def _take_down(held: _Group, abort: bool) -> None:
    if not isinstance(held.group, _Gloo):
        if abort:
            with suppress(RuntimeError):  # not in time: destroying it goes on waiting
                held.group.abort()
        dist.destroy_process_group(held.group)
    held.gone.set()
    # Broadcasts under way end at their own deadline; the group's destructor, here, waits for them.


def _ranks(server: Server, info: dict) -> int:
    """How many ranks of ``server`` receive weights. ``info``: its ``/server_info``."""
    stages, copies = int(info.get("pp_size") or 1), int(info.get("dp_size") or 1)
    if stages > 1 or (copies > 1 and not info.get("enable_dp_attention")):
        raise RolloutError(
            f"{server.url} has {stages} pipeline stages and {copies} data-parallel copies, SGLang takes weights from a"
            " group with one of each: start several servers instead, or publish by disk"
        )
    return int(info.get("tp_size") or 1)


def _listening(address: str, url: str) -> str:
    """Where this host's part of a group listens whose store is at ``address``: there, where that is an address of this
    host, else at the one on the way to the server."""
    with suppress(OSError, ValueError):
        network.interface_with(bare(address))
        return bare(address)
    return _own_address(url)


def _own_address(url: str) -> str:
    """The address that this host has for the server at ``url``. Raises RolloutError."""
    parts = urlsplit(url)
    assert parts.hostname is not None  # a server's address has one, see check_url()
    try:
        return own_address(parts.hostname, parts.port or 80)
    except (OSError, UnicodeError) as error:
        raise RolloutError(
            f"this host finds no way to {url} ({error}): does its name resolve here? set publish.address to the address"
            " at which servers reach this host"
        ) from error
