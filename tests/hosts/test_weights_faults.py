"""The link of a server's host goes down while weights stream to it: a real SGLang server on a host of its own."""

import subprocess
import sys
import time

import pytest

from tests.hosts.machines import wait_until
from tests.hosts.runs import Run, one_sentence, report
from tests.sglang_servers import server_options

pytestmark = [pytest.mark.sglang, pytest.mark.thorough]
PORT = 30000
# Of a publication's phase; of one bucket at one server; of the wait for a server where none is left.
PHASE, BUCKET, BACK = 60.0, 10.0, 15.0


@pytest.fixture
def run(make_hosts):
    """One rank on h1, sampling from a server on h2, with weights in many buckets: a publication that lasts."""
    hosts = make_hosts(2)
    key = hosts.shared / "key"
    key.write_text("a-key-of-these-tests")
    key.chmod(0o600)
    made = Run(
        hosts, "rollout.engine=sglang", f"servers.urls=[http://{hosts[1].ipv4}:{PORT}]", f"servers.api_key_file={key}",
        f"servers.start_timeout_seconds={BACK}", "publish.bucket_bytes=2000", f"publish.timeout_seconds={PHASE}",
        f"publish.bucket_timeout_seconds={BUCKET}", "training.timeout_seconds=120", world=1,
    )  # fmt: skip
    with (hosts.shared / "serve.log").open("w") as log:
        server = hosts[1].popen(
            sys.executable, "-m", "dcpo_megatron.cli", "serve", hosts.shared / "task" / "start", "--device", "cpu",
            "--host", "0.0.0.0",
            "--advertise", hosts[1].ipv4, "--port", PORT, "--api-key-file", key, "--logs", hosts.shared / "logs",
            "--address-file", hosts.shared / "servers.json", *server_options(), "--", "--max-running-requests", "16",
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def ready() -> bool:
        assert server.poll() is None, (hosts.shared / "serve.log").read_text()
        return (hosts.shared / "servers.json").exists()

    wait_until(ready, 300, "the server")
    return made


def streams(run: Run) -> None:
    """Until buckets are under way: a server is first asked whether it is there."""
    while True:
        run.wait_for_phase("publish")
        time.sleep(0.4)
        if run.phase() == "publish":
            return


def test_a_server_cut_off_while_it_receives_is_named_and_a_short_cut_costs_time_only(run):
    server = run.hosts[1]
    run.start().wait_for_step(3)
    streams(run)
    at, began = run.steps(), time.monotonic()
    server.pull_the_plug()
    time.sleep(5)
    server.plug_in()
    run.wait_for_step(at + 3, 120)
    print(f"\nserver's link down for 5 s while weights stream: three steps more after {time.monotonic() - began:.1f} s")
    for way in ("down", "silent"):
        streams(run)
        server.pull_the_plug() if way == "down" else server.fall_silent()
        (rank,) = run.end(PHASE + BUCKET + BACK + 30)
        report(f"server's link {way} while weights stream", PHASE, [rank])
        print(one_sentence(rank, f"http://{server.ipv4}:{PORT}"))
        assert rank.code == 1 and "Traceback" not in rank.log
        step = run.whole()
        server.plug_in()
        run.start().wait_for_step(step + 3)
