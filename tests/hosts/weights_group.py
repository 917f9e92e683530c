"""The two sides of a weights' group, for tests/hosts/test_weights_group.py: each runs on a host of its own.

python -m tests.hosts.weights_group server PORT   joins and receives as SGLang does, with what `dcpo serve` adds
python -m tests.hosts.weights_group trainer       reads servers' addresses; sends a bucket to each, says what came of it
"""

from __future__ import annotations

import datetime
import os
import socket
import sys
from http.server import ThreadingHTTPServer

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from dcpo_megatron.rollout.protocol import RolloutError
from dcpo_megatron.rollout.server import Server
from dcpo_megatron.rollout.serving.sglang_server import listen_towards_the_others
from dcpo_megatron.weights.publish.buckets import Bucket
from dcpo_megatron.weights.publish.process_group import ProcessGroupTransport
from tools.check_publishing import Player

SECONDS = 20.0


class BothFamilies(ThreadingHTTPServer):
    address_family = socket.AF_INET6

    def server_bind(self):
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


class AsSGLang(Player):
    """Meets by a URL, as SGLang's init_custom_process_group does."""

    def __init__(self, port: int):
        super().__init__("cpu")
        handler = self.http.RequestHandlerClass
        self.http.server_close()
        self.http = BothFamilies(("::", port), handler)

    def told(self, path: str) -> dict:
        return {"interface": os.environ.get("NCCL_SOCKET_IFNAME")} if path == "/interface" else super().told(path)

    def _join(self, body: dict) -> None:
        world, name, limit = body["world_size"], body["group_name"], datetime.timedelta(seconds=SECONDS)
        url = f"tcp://{body['master_address']}:{body['master_port']}"
        store, rank, world = next(c10d.rendezvous(url, body["rank_offset"], world, timeout=limit))
        group, _ = c10d._new_process_group_helper(
            world, rank, [], c10d.Backend(body["backend"]), dist.PrefixStore(name, store), group_name=name,
            timeout=limit
        )  # fmt: skip
        c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
        self._groups[name] = (group, store)


def serve(port: int) -> None:
    listen_towards_the_others()
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:29600", rank=0, world_size=1)  # a scheduler's own
    player = AsSGLang(port)
    print("ready", flush=True)
    player.http.serve_forever()


def train() -> None:
    transport = ProcessGroupTransport("gloo", torch.device("cpu"), None, SECONDS)
    tensor = torch.arange(1000.0)
    print("ready", flush=True)
    for url in map(str.strip, sys.stdin):
        server = Server(url)
        try:
            transport.connect(server, False, SECONDS)
            transport.send(server, Bucket([("weight", tensor)], tensor.nbytes), None, SECONDS)
            print(f"arrived {server.get('/interface')['interface']}", flush=True)
        except RolloutError as error:
            print(" ".join(str(error).split()), flush=True)
            transport.drop(server)


if __name__ == "__main__":
    serve(int(sys.argv[2])) if sys.argv[1] == "server" else train()
