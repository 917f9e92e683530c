"""What the server environment's Python runs, by this file's path: stock SGLang, with six things around it that the
project needs.

    launcher -- pipe --> standard input: one line of JSON, {"api_key": ...}; then nothing, until the launcher is gone
                            |                 end of file --> the guardian ends them all
    guardian (a fork) ------+
    sglang.launch_server: HTTP in this process, scheduler and detokenizer in spawned ones

1. The API key comes through the pipe: neither `ps` nor the log shows it.
2. However the launcher ends, the server ends: a killed launcher closes the pipe too. This also reaches through ssh and
   into containers, where a parent-death signal does not.
3. On a CPU, inert stand-ins for the two imports that have nothing behind them there. They stand in the module's body
   because spawned processes run it too.
4. On a CPU, what SGLang lacks there for sampling by each request's own seed (``--enable-deterministic-inference``).
5. GET /dcpo_environment: what of this environment must be the trainer's too where weights come over NCCL.
6. The group of the weights listens at the address that leads to the trainer, whatever this host's own name resolves to.

Only the standard library and SGLang are imported: dcpo_megatron is not installed in the server environment.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import ipaddress
import json
import logging
import os
import signal
import socket
import stat
import sys
import time
import types
from urllib.parse import urlsplit

# Python puts a script's folder first on the import path; the modules beside this one are not meant for the server.
sys.path[:] = [
    entry for entry in sys.path if os.path.abspath(entry or ".") != os.path.dirname(os.path.abspath(__file__))
]

# `sgl_kernel` has CUDA kernels; SGLang 0.5.20 imports nothing from it on a CPU, 0.5.23 one function that torch_native
# attention never calls. torchvision's wheels need a CUDA build of torch; SGLang imports it for pictures.
STAND_INS = ("sgl_kernel", "torchvision")
TRACKER_SECONDS = 1.0
SNAPSHOTS = "/dev/shm/sglang_loads_"
_kept: list = []


class _Nothing:
    """Any value of a stand-in: has every attribute, and fails with a sentence when it is called."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str):
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return _Nothing(f"{self._name}.{attribute}")

    def __call__(self, *args, **kwargs):
        raise RuntimeError(f"{self._name} does not exist on a CPU; text models do not need it")


class _StandIn(types.ModuleType):
    def __getattr__(self, attribute: str):
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return _Nothing(f"{self.__name__}.{attribute}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the stand-ins and every module below them."""

    def __init__(self, names: list[str]):
        self._names = names

    def find_spec(self, name: str, path=None, target=None):
        if name.partition(".")[0] in self._names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module) -> None:
        pass


def put_stand_ins() -> None:
    """Makes ``STAND_INS`` importable where nothing real is installed."""
    # transformers asks once whether torchvision is there, and would import more of it: it asks while it is absent. It
    # then offers a dummy of this class, which SGLang registers its own processors with.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    import transformers  # isort: skip -- the import above may replace this module by another object

    transformers.AutoImageProcessor = AutoImageProcessor
    sys.meta_path.append(_Finder([name for name in STAND_INS if importlib.util.find_spec(name) is None]))


def make_seeds_work() -> None:
    """Lets ``--enable-deterministic-inference`` start on a CPU: then each request's ``sampling_seed`` decides its
    tokens, in whatever company it is sampled.

    SGLang has three things for it on accelerators only: attention backends that it calls deterministic (torch_native
    attends to one sequence at a time, so that no other one can matter), kernels whose sums do not depend on the batch
    (on a CPU matrix products do, by some 1e-7), and the hash of seed and position.
    """
    import sglang.srt.batch_invariant_ops as batch_invariant_ops
    import torch
    from sglang.srt.arg_groups import choices

    choices.add_deterministic_attention_backend_choices(["torch_native"])
    choices.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
    batch_invariant_ops.enable_batch_invariant_mode = lambda *args, **kwargs: None
    if not hasattr(torch.ops.sgl_kernel, "murmur_hash32_cpu"):
        library = torch.library.Library("sgl_kernel", "FRAGMENT")
        library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor columns) -> Tensor")
        library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")
        _kept.append(library)  # it takes its operators along when it is deleted


def murmur_hash32(seed, positions, columns):
    """MurmurHash3 of (64-bit ``seed`` [n], 32-bit ``positions`` [n], 32-bit ``columns`` [m]) -> uint32 [n, m], as
    SGLang's Triton kernel computes it."""
    import torch

    mask = 0xFFFFFFFF

    def mix(state, block):
        block = (block & mask) * 0xCC9E2D51 & mask
        block = (block << 15 | block >> 17) & mask
        state = state ^ (block * 0x1B873593 & mask)
        state = (state << 13 | state >> 19) & mask
        return (state * 5 + 0xE6546B64) & mask

    seed = seed.view(torch.int64)[:, None]
    state = mix(torch.zeros_like(seed), seed)
    state = mix(state, seed >> 32)
    state = mix(state, positions.to(torch.int64)[:, None])
    state = mix(state, columns.to(torch.int64)[None]) ^ 16
    state = (state ^ state >> 16) * 0x85EBCA6B & mask
    state = (state ^ state >> 13) * 0xC2B2AE35 & mask
    return (state ^ state >> 16).to(torch.uint32)


def tell_environment() -> None:
    """Adds GET /dcpo_environment to the server: torch, NCCL's version (null where this torch has none) and
    NCCL_CUMEM_ENABLE, as SGLang has set it."""
    import torch
    from sglang.srt.entrypoints.http_server import app

    @app.get("/dcpo_environment")
    async def environment() -> dict:
        nccl = list(torch.cuda.nccl.version()) if torch.distributed.is_nccl_available() else None
        return {"torch": torch.__version__, "nccl": nccl, "NCCL_CUMEM_ENABLE": os.environ.get("NCCL_CUMEM_ENABLE")}


def listen_towards_the_others() -> None:
    """Lets gloo listen, in each group that meets over TCP, at this host's address on the way to where it meets; NCCL,
    unless it has begun, at that address's interface.

    torch takes what the host's name resolves to (127.0.1.1, on Debian), SGLang leaves it at that. What
    GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME says stays.
    """
    from torch.distributed import distributed_c10d as c10d

    meet, make = c10d.rendezvous, c10d.ProcessGroupGloo.__init__
    way: list[str] = []

    def rendezvous(url, *args, **kwargs):
        way[:] = own_address(url)
        if way and not ipaddress.ip_address(way[0]).is_loopback and (name := interface_with(way[0])):
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")
        return meet(url, *args, **kwargs)

    def init(self, store, rank, size, *rest, **named):
        if way and not rest and named.keys() <= {"timeout"} and "GLOO_SOCKET_IFNAME" not in os.environ:
            options = c10d.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stub lacks it
            options._devices = [c10d.ProcessGroupGloo.create_device(hostname=way[0])]
            if named.get("timeout") is not None:
                options._timeout = named["timeout"]
            rest, named = (options,), {}
        make(self, store, rank, size, *rest, **named)

    c10d.rendezvous = rendezvous
    c10d.ProcessGroupGloo.__init__ = init  # type: ignore[method-assign]  # torch has no other way in


def own_address(url: str) -> list[str]:
    """This host's address on the way to where ``url`` ("tcp://HOST:PORT") is; none where none leads there. Sends
    nothing."""
    parts = urlsplit(url)
    with contextlib.suppress(OSError, UnicodeError, ValueError):
        for family, kind, protocol, _, address in socket.getaddrinfo(
            parts.hostname, parts.port, type=socket.SOCK_DGRAM
        ):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                return [probe.getsockname()[0]]
    return []


def interface_with(address: str) -> str | None:
    """The interface of this host that has ``address``."""
    import psutil

    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    return None


def read_api_key() -> str | None:
    """The key from the launcher's line on standard input. Ends the process where standard input is not the launcher's
    pipe."""
    if not stat.S_ISFIFO(os.fstat(0).st_mode) and not stat.S_ISSOCK(os.fstat(0).st_mode):
        sys.exit("standard input is not the launcher's pipe: a container's command must pass it on (docker run -i)")
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)  # not more: what follows is for the guardian
        if not byte:
            sys.exit("the launcher has gone before it said how to start")
        line += byte
    return json.loads(line)["api_key"]


def fork_guardian() -> None:
    """A small process that waits for the end of standard input and then ends the server. Call it before there are
    threads.

    The server's own children die with it (SGLang asks the kernel for that), and multiprocessing's tracker then removes
    what they left in /dev/shm; what it does not know of is removed here. What is still in the process group after
    ``TRACKER_SECONDS`` is killed, the guardian with it.
    """
    parent = os.getpid()
    if os.fork() == 0:
        # The launcher's polite signals are for SGLang alone.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        while os.read(0, 4096):
            pass
        try:
            left = shared_files()
            if os.getppid() == parent:
                os.kill(parent, signal.SIGKILL)
            time.sleep(TRACKER_SECONDS)
            for name in left:
                with contextlib.suppress(OSError):
                    os.unlink(name)
        finally:
            os.killpg(0, signal.SIGKILL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def shared_files() -> set[str]:
    """The files of SGLang's load snapshots that this process group has mapped. They are named at random, and nobody
    removes those of a killed server."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has just ended, or is not ours to look at
            if os.getpgid(int(pid)) == os.getpgid(0):
                with open(f"/proc/{pid}/maps") as maps:
                    found |= {
                        name for line in maps if (name := line.split(maxsplit=5)[-1].strip()).startswith(SNAPSHOTS)
                    }
    return found


def keep_out_of_the_log(secret: str) -> None:
    """SGLang logs its arguments, the key among them."""
    make = logging.getLogRecordFactory()

    def record(*args, **kwargs) -> logging.LogRecord:
        made = make(*args, **kwargs)
        text = made.getMessage()
        if secret in text:
            made.msg, made.args = text.replace(secret, "(hidden)"), ()
        return made

    logging.setLogRecordFactory(record)


def main() -> None:
    api_key = read_api_key()
    fork_guardian()
    arguments = sys.argv[1:]
    if api_key:
        keep_out_of_the_log(api_key)
        arguments += ["--api-key", api_key]
    if ON_CPU:
        put_stand_ins()
        make_seeds_work()
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    server_args = prepare_server_args(arguments)
    tell_environment()
    run_server(server_args)


ON_CPU = os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"
if __name__ == "__main__":
    main()
else:
    if ON_CPU:
        put_stand_ins()
        make_seeds_work()
    if __name__ == "__mp_main__":
        listen_towards_the_others()
