"""Stand-ins for what no CPU has: NCCL's first collective, which blocks in C++ until every rank has called it, and
servers that make their side of it only when they are asked to.

Only what :mod:`dcpo_megatron.weights.publish.process_group` does with them is there; gloo and real servers are in
test_publish.py.
"""

from __future__ import annotations

import json
import os
import threading
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import torch
import torch.distributed as dist

from dcpo_megatron.rollout.server import Server

BACKEND = "blocking"


class BlockingGroup(dist.ProcessGroup):
    """Rank 0's side. Every call blocks, out of Python's reach and without a deadline, until the peer has made its side
    or the group is aborted."""

    made: list[BlockingGroup] = []

    def __init__(self, store, rank: int, size: int, timeout: timedelta):
        super().__init__(rank, size)
        self.timeout = timeout
        self.environment = {name: value for name, value in os.environ.items() if name.startswith("TORCH_NCCL")}
        self.sent: list[torch.Tensor] = []
        self.aborted = False
        self._name = ""
        self._closed = threading.Lock()
        self._closed.acquire()
        self.made.append(self)

    @property
    def group_name(self) -> str:
        return self._name

    def _set_group_name(self, name: str) -> None:
        self._name = name

    def peer_calls(self) -> None:
        if self._closed.locked():
            self._closed.release()

    def broadcast(self, tensors, opts):
        self._block()
        self.sent += tensors
        return SimpleNamespace(wait=self._block)

    def abort(self) -> None:
        self.aborted = True
        self.peer_calls()

    def shutdown(self) -> None:
        if not self.aborted:
            self._block()

    def _block(self) -> None:
        with self._closed:
            pass
        if self.aborted:
            raise RuntimeError("communicator was aborted")


class BlockingServer:
    """A server that answers every control request, and calls its side of the group on
    ``/update_weights_from_distributed``.

    ``loads(body)`` is called then: None, or the (status, answer) of a refusal, before the group is called.
    ``environment``: what `dcpo serve` makes it tell of its NCCL."""

    def __init__(self, loads=lambda body: None, info: dict | None = None, environment: dict | None = None):
        self.asked: list[str] = []
        self.tag = "unpublished"
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(self.path)
                told = {
                    "/server_info": {"tp_size": 1} | (info or {}),
                    "/model_info": {"weight_version": outer.tag},
                    "/openapi.json": {"paths": {"/dcpo_environment": {}} if environment else {}},
                    "/dcpo_environment": environment,
                }
                self._answer(200, told[self.path])

            def do_POST(self):
                outer.asked.append(self.path)
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.tag = body.get("new_version", outer.tag)
                refusal = None
                if self.path == "/update_weights_from_distributed":
                    refusal = loads(body)
                    if refusal is None:
                        outer.group(body["group_name"]).peer_calls()
                self._answer(*(refusal or (200, {})))

            def _answer(self, status: int, told: dict):
                content = json.dumps(told).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.server = Server(f"http://127.0.0.1:{self._http.server_port}")
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def group(self, name: str) -> BlockingGroup:
        return next(group for group in reversed(BlockingGroup.made) if group.group_name == name)

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self.server.close()


def register() -> None:
    """Makes the backend known to torch, once in a process."""
    if BACKEND.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(BACKEND, BlockingGroup, devices=["cpu"])
