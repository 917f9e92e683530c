"""Real SGLang servers on a host of their own, a router on another, two ranks on two more: every host's own name is
127.0.1.1 there, and docker has an interface on each."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from dcpo_megatron.rollout.serving.command import default_command
from dcpo_megatron.verification.resumption import make_task
from tests.hosts.machines import Host, Hosts, wait_until
from tests.sglang_servers import server_options

# Two servers start at once, on cores that other tests may be using.
START_SECONDS = 500
pytestmark = [pytest.mark.sglang, pytest.mark.thorough, pytest.mark.timeout(START_SECONDS + 400)]
KEY = "a-key-of-these-tests"
PORT, PORT6, ROUTER = 30000, 30010, 30100


class Place:
    """The hosts, what they share, and how runs are started on them. ``running``: servers and router, ready."""

    def __init__(self, hosts: Hosts):
        self.hosts, self.shared = hosts, hosts.shared
        self.task = make_task(self.shared / "task", steps=2)
        self.key, self.wrong = (self.file(name, text) for name, text in (("key", KEY), ("wrong", "another")))
        self.running = {}

    def file(self, name: str, text: str) -> Path:
        (self.shared / name).write_text(text)
        (self.shared / name).chmod(0o600)
        return self.shared / name

    def start(self, host: Host, log: str, *words, **env: str) -> subprocess.Popen:
        with (self.shared / log).open("w") as file:
            return host.popen(*words, stdout=file, stderr=subprocess.STDOUT, env=env)

    def said(self, log: str) -> str:
        return (self.shared / log).read_text()

    def serve(self, host: Host, listen: str, advertise: str, port: int) -> None:
        self.running[f"serve-{port}"] = self.start(
            host, f"serve-{port}", sys.executable, "-m", "dcpo_megatron.cli", "serve", self.shared / "task" / "start",
            "--device", "cpu",
            "--host", listen, "--advertise", advertise, "--port", port, "--api-key-file", self.key,
            "--logs", self.shared / "logs", "--address-file", self.shared / "servers" / f"{port}.json",
            *server_options(), "--", "--max-running-requests", "16",
        )  # fmt: skip

    def route(self, host: Host, *workers: str) -> None:
        self.running["router"] = self.start(
            host, "router", *default_command(), "-m", "sglang_router.launch_router", "--host", "0.0.0.0", "--port",
            ROUTER,
            "--api-key", KEY, "--worker-urls", *workers,
        )  # fmt: skip

    def train(self, name: str, hosts: list[Host], *options: str, seconds: float = 240) -> list[tuple[int, str]]:
        """A run with a rank on each of ``hosts``: each rank's exit code and what it said."""
        words = [
            *self.task,
            "optimizer.warmup_steps=0",
            "rollout.engine=sglang",
            f"output={self.shared / name}",
            *options,
        ]
        common = {
            "NNODES": str(len(hosts)),
            "NPROC_PER_NODE": "1",
            "MASTER_ADDR": hosts[0].ipv4,
            "PYTHON": sys.executable,
        }
        logs = [f"{name}-{host.name}" for host in hosts]
        processes = [
            self.start(host, log, "bash", "examples/pretrain_dcpo.sh", *words, NODE_RANK=str(rank), **common)
            for rank, (host, log) in enumerate(zip(hosts, logs, strict=True))
        ]
        try:
            until = time.monotonic() + seconds
            codes = [process.wait(max(0.1, until - time.monotonic())) for process in processes]
        finally:
            for process in processes:
                process.kill()
        return list(zip(codes, map(self.said, logs), strict=True))

    def rows(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.shared / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def place(namespaces):
    with (
        tempfile.TemporaryDirectory(prefix="hosts-", dir="/tmp") as folder,
        Hosts(4, Path(folder), names="loopback") as hosts,
    ):
        for host in hosts:
            host.add_interface("docker0", "172.17.0.1/16")
        found = Place(hosts)
        # By its name, which is another address on the host itself than the one that it listens at; and on IPv6 alone.
        found.serve(hosts[2], hosts[2].ipv4, "h3", PORT)
        found.serve(hosts[2], "::", hosts[2].ipv6, PORT6)
        found.route(hosts[3], f"http://{hosts[2].ipv4}:{PORT}", f"http://[{hosts[2].ipv6}]:{PORT6}")
        found.urls = [f"http://{where}:{port}" for where, port in (("h3", PORT), (f"[{hosts[2].ipv6}]", PORT6))]

        def ready() -> bool:
            for name, process in found.running.items():
                assert process.poll() is None, found.said(name)
            return len(list((found.shared / "servers").glob("*.json"))) == 2

        wait_until(ready, START_SECONDS, "the servers")
        yield found


def check(place: Place, name: str, ranks: list[tuple[int, str]]) -> None:
    assert [code for code, _ in ranks] == [0, 0], ranks
    steps = place.rows(name)
    # The second batch was sampled after a publication: weights that had not arrived would show.
    assert len(steps) == 2 and max(row["mismatch_abs_max"] for row in steps) < 1e-4
    servers = json.loads((place.shared / name / "health" / "servers.json").read_text())["servers"]
    assert [server["version"] for server in servers] == [2, 2]


def test_weights_by_process_group_to_servers_by_name_and_by_ipv6(place):
    ranks = place.train(
        "group", place.hosts[:2], f"servers.file={place.shared / 'servers'}", "servers.count=2",
        f"servers.api_key_file={place.key}",
    )  # fmt: skip
    check(place, "group", ranks)
    listed = json.loads((place.shared / "group" / "health" / "servers.json").read_text())["servers"]
    assert [server["url"] for server in listed] == place.urls
    # Every address that the servers' gloo gave away leads to them.
    assert "127.0.1.1" not in "".join(file.read_text() for file in (place.shared / "logs").glob("*.log"))


def test_weights_by_the_shared_folder_and_prompts_through_a_router(place):
    urls = json.dumps([f"http://{place.hosts[2].ipv4}:{PORT}", place.urls[1]])
    ranks = place.train(
        "disk", place.hosts[:2], f"servers.urls={urls}", f"servers.api_key_file={place.key}",
        f"servers.router=http://h4:{ROUTER}", "publish.mode=disk",
    )  # fmt: skip
    check(place, "disk", ranks)
    assert place.said("router").count("/generate") > 16


@pytest.mark.parametrize("given", ["none", "wrong"])
def test_a_key_that_is_missing_or_wrong_is_said_at_once(place, given):
    key = [f"servers.api_key_file={place.wrong}"] if given == "wrong" else []
    ((code, said),) = place.train(f"key-{given}", place.hosts[:1], f"servers.urls={json.dumps(place.urls)}", *key)
    sentence = next(line for line in said.splitlines() if line.startswith("dcpo: error:"))
    assert code == 1 and "Traceback" not in said
    assert all(url in sentence for url in place.urls) and "401" in sentence and "servers.api_key_file" in sentence


def test_a_folder_of_weights_that_the_servers_host_does_not_see_is_said(place):
    ((code, said),) = place.train(
        "unseen", place.hosts[:1], f"servers.urls={json.dumps(place.urls)}", f"servers.api_key_file={place.key}",
        "publish.mode=disk", "publish.folder=/tmp/of-h1",
    )  # fmt: skip
    sentence = next(line for line in said.splitlines() if line.startswith("dcpo: error:"))
    assert code == 1 and "Traceback" not in said
    assert "does its host see that folder" in sentence and "/tmp/of-h1/version-0" in sentence


def test_a_server_that_only_its_own_host_reaches_is_said_on_every_rank(make_hosts):
    """A stand-in answers on the loopback of the first host: no weights are sent before it is found out."""
    hosts = make_hosts(2)
    place = Place(hosts)
    program = """
from http.server import *
class One(BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{"model_path": "m", "weight_version": "unpublished"}'
        self.send_response(200); self.send_header("Content-Type", "application/json");
        self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
ThreadingHTTPServer(("127.0.0.1", 30000), One).serve_forever()
"""
    place.start(hosts[0], "stand-in", sys.executable, "-c", program)
    ranks = place.train("alone", list(hosts), 'servers.urls=["http://127.0.0.1:30000"]')
    for code, said in ranks:
        sentence = next(line for line in said.splitlines() if line.startswith("dcpo: error:"))
        assert (
            code == 1
            and "Traceback" not in said
            and sentence.startswith(
                "dcpo: error: host h2 (rank 1) does not reach http://127.0.0.1:30000, which rank 0 on h1 does"
            )
        )
        assert "dcpo serve --host 0.0.0.0" in sentence
