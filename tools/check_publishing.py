#!/usr/bin/env python3
"""What of publishing only GPUs can show: NCCL between two of them, and the memory that a server on the trainer's GPU
gives back.

    python tools/check_publishing.py broadcast                        two GPUs: a process on the second plays a server
    python tools/check_publishing.py release --server-python PATH     one GPU, and SGLang's environment
    python tools/check_publishing.py broadcast --device cpu --millions 2     the same over gloo, on any machine

``broadcast``: the publisher of a run sends random weights three times, by mode ``distributed``. The server is a small
process that answers what the publisher asks and, as SGLang does, joins a stand-alone group when it is told to and calls
its side of a broadcast when it is asked for weights, not before. What it received is compared bit for bit. With a real
server ``tools/bench_publish.py --modes distributed`` measures the same.

``release``: a real server with a random model, weights handed over by CUDA IPC, its memory released and taken back;
bytes in use on the GPU at each point.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# A checkout runs without being installed.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SECONDS = 120.0
PUBLICATIONS = 3


# -- the process that plays a server -----------------------------------------------------------------------------------


class Player:
    """Answers a publisher over HTTP; receives on ``device``. A request that it does not know gets an empty answer."""

    def __init__(self, device: str):
        import torch

        self.device = torch.device(device)
        self.received: dict[str, torch.Tensor] = {}
        self._groups: dict[str, tuple] = {}
        self._version = "unpublished"
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self._answer(200, outer.told(self.path))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
                try:
                    self._answer(200, outer.asked(self.path.partition("?")[0], body))
                except Exception as error:
                    self._answer(400, {"success": False, "message": f"{type(error).__name__}: {error}"})

            def _answer(self, status: int, what: dict):
                content = json.dumps(what).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def told(self, path: str) -> dict:
        """The answer to a GET."""
        if path == "/received":
            return {name: _crc(tensor) for name, tensor in self.received.items()}
        answers = {
            "/server_info": {"tp_size": 1, "version": "played"},
            "/model_info": {"weight_version": self._version},
            "/openapi.json": {"paths": {}},
        }
        return answers.get(path, {})

    def asked(self, path: str, body: dict) -> dict:
        """The answer to a POST."""
        if path == "/init_weights_update_group":
            self._join(body)
        elif path == "/destroy_weights_update_group":
            import torch.distributed as dist

            dist.destroy_process_group(self._groups.pop(body["group_name"])[0])  # KeyError: there is none
        elif path == "/update_weights_from_distributed":
            self._receive(body)
        elif path == "/update_weight_version":
            self._version = body["new_version"]
        return {"success": True}

    def _join(self, body: dict) -> None:
        import torch.distributed as dist
        from torch.distributed import distributed_c10d as c10d

        limit, world, name = datetime.timedelta(seconds=SECONDS), body["world_size"], body["group_name"]
        store = dist.TCPStore(body["master_address"], body["master_port"], world, is_master=False, timeout=limit)
        group, _ = c10d._new_process_group_helper(
            world, body["rank_offset"], [], c10d.Backend(body["backend"]), dist.PrefixStore(name, store),
            group_name=name, timeout=limit,
        )  # fmt: skip
        c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
        self._groups[name] = (group, store)

    def _receive(self, body: dict) -> None:
        import torch
        import torch.distributed as dist

        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # the current device is a thread's own
        group = self._groups[body["group_name"]][0]
        into = [
            torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            for shape, dtype in zip(body["shapes"], body["dtypes"], strict=True)
        ]
        works = [dist.broadcast(tensor, src=0, group=group, async_op=True) for tensor in into]
        for work in works:
            work.wait()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.received |= zip(body["names"], into, strict=True)


def _crc(tensor) -> int:
    import torch

    return zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())


def play(device: str) -> None:
    """A :class:`Player` until standard input ends; its port is the first line of output."""
    import os

    player = Player(device)
    print(player.http.server_port, flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    player.http.serve_forever()


# -- the trainer's side ------------------------------------------------------------------------------------------------


def broadcast(args: argparse.Namespace) -> dict:
    """Publishes to a process that plays a server; raises RuntimeError where it did not receive the same bits."""
    import torch

    from dcpo_megatron.rollout.fleet import Fleet
    from dcpo_megatron.rollout.server import Server
    from dcpo_megatron.weights.publish import PublishOptions, WeightPublisher

    cuda = args.device == "cuda"
    mine, its = (torch.device("cuda", 0), "cuda:1") if cuda else (torch.device("cpu"), "cpu")
    command = [sys.executable, __file__, "--play", its]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as player:
        try:
            port = player.stdout.readline().strip()
            if not port:
                raise RuntimeError("the process that plays a server ended before it listened: its own words are above")
            fleet = Fleet([Server(f"http://127.0.0.1:{port}")], "check")
            options = PublishOptions(
                mode="distributed", backend="nccl" if cuda else "gloo", bucket_bytes=64 * 2**20, timeout=SECONDS,
                bucket_timeout=SECONDS / 2, verify=False, scrub=False,
            )  # fmt: skip
            publisher = WeightPublisher(fleet, options, device=mine)
            seconds, report = [], None
            for version in range(1, PUBLICATIONS + 1):
                tensors = list(_weights(args.millions, mine, version))
                began = time.perf_counter()
                report = publisher.publish(iter(tensors), version)
                seconds.append(time.perf_counter() - began)
                got = fleet.servers[0].get("/received")
                wrong = [name for name, tensor in tensors if got.get(name) != _crc(tensor)]
                if wrong:
                    raise RuntimeError(f"version {version}: {wrong[0]} and {len(wrong) - 1} more arrived as other bits")
            publisher.close()
        finally:
            player.stdin.close()
            try:
                player.wait(20)
            except subprocess.TimeoutExpired:
                player.kill()
    rate = report.bytes / report.seconds["stream"]
    print(f"{report.bytes / 1e6:.0f} MB in {report.buckets} buckets, {PUBLICATIONS} publications bit for bit")
    print(f"first {seconds[0]:.2f} s, then {min(seconds[1:]):.2f} s; the stream alone {rate / 1e9:.2f} GB/s")
    return {"bytes": report.bytes, "buckets": report.buckets, "seconds": seconds, "phases": report.seconds}


def _weights(millions: float, device, seed: int):
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    rows = 1024
    for number in range(max(2, round(millions * 1e6 / (rows * 1024)))):
        yield (
            f"w{number}",
            torch.randn(rows, 1024, dtype=torch.bfloat16, device=device, generator=generator),
        )
    yield "odd", torch.randn(3, 7, device=device, generator=generator)


def release(args: argparse.Namespace) -> dict:
    """Bytes in use on the GPU while a server on it samples, has released its memory, and has taken it back."""
    import torch
    from bench_publish import make_model

    from dcpo_megatron.mcore.platform import prepare, select_platform
    from dcpo_megatron.rollout.fleet import Fleet
    from dcpo_megatron.rollout.server import Server
    from dcpo_megatron.rollout.serving import start_servers
    from dcpo_megatron.weights.hf_folder import SafetensorsFolder
    from dcpo_megatron.weights.publish import PublishOptions, WeightPublisher

    platform = select_platform(args.device)
    prepare(platform)
    used: dict[str, int | None] = {}

    def note(when: str) -> None:
        free, total = (0, 0) if platform.is_cpu else torch.cuda.mem_get_info(platform.device)
        used[when] = None if platform.is_cpu else total - free
        print(f"{when:32} {'-' if platform.is_cpu else f'{used[when] / 2**30:6.2f} GiB'}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_model(model, args.millions, "bfloat16" if args.device == "cuda" else "float32")
        note("before the server")
        command = [args.server_python] if args.server_python else None
        with start_servers(model, 1, command=command, device=args.device, colocated=True, say=print) as running:
            source, server = SafetensorsFolder(model), Server(running.urls[0])
            options = PublishOptions(mode="ipc", timeout=SECONDS, verify=False)
            publisher = WeightPublisher(Fleet([server], "check"), options, device=platform.device)
            for version in (1, 2):
                publisher.publish(
                    ((name, source.read(name).to(platform.device)) for name in sorted(source.names())), version
                )
                if not server.generates():
                    raise RuntimeError(f"the server does not sample with version {version}")
                note(f"version {version} is served")
                if version == 1 and not platform.is_cpu:  # a server on a CPU keeps its memory
                    publisher.release_memory()
                    note("released")
            publisher.close()
        note("after the server")
    return {"used": used}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("what", nargs="?", choices=("broadcast", "release"), default="broadcast")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--millions", type=float, default=500, help="million parameters (default 500)")
    made.add_argument("--server-python", metavar="PATH", help="release: the server environment's interpreter")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write every number to this file")
    made.add_argument("--play", metavar="DEVICE", help=argparse.SUPPRESS)
    return made


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    if args.play:
        play(args.play)
        return 0
    from dcpo_megatron.console.quiet import quiet_libraries
    from dcpo_megatron.rollout.protocol import RolloutError

    quiet_libraries()
    try:
        found = (broadcast if args.what == "broadcast" else release)(args)
    except (RolloutError, RuntimeError, ValueError) as error:
        print(f"check_publishing: error: {error}", file=sys.stderr)
        return 1
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
