"""tools/launch_cluster.py with a stand-in for ssh: a script that runs the line on this machine. Two "hosts", really two
torchruns that train one run."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dcpo_megatron.launch.ssh import meeting_places, read_hosts
from dcpo_megatron.launch.ssh_node import choose_address
from dcpo_megatron.network import free_port
from dcpo_megatron.verification.resumption import make_task, steps_done

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> list[str]:
    return make_task(tmp_path_factory.mktemp("task"), steps=2)


@pytest.fixture
def stand_in(tmp_path) -> Path:
    """Takes what ssh takes, HOST LINE. Hosts named gone-* cannot be reached, silent-* never answer."""
    script = tmp_path / "stand-in-ssh"
    script.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        '  gone-*) echo "ssh: connect to host $1 port 22: Connection refused" >&2; exit 255 ;;\n'
        "  silent-*) exec sleep 60 ;;\n"
        "esac\n"
        'exec sh -c "$2"\n'
    )
    script.chmod(0o755)
    return script


def start(stand_in: Path, hosts: str, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.Popen:
    command = [
        sys.executable, ROOT / "tools" / "launch_cluster.py", "--hosts", hosts, "--nproc-per-node", "1", "--ssh",
        stand_in,
        "--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--directory", ROOT, "--env",
        "OMP_NUM_THREADS=1",
        *options, "--", *arguments,
    ]  # fmt: skip
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_hosts_train_one_run_to_the_end(stand_in, task, tmp_path):
    process = start(stand_in, "alpha,beta", *task, f"output={tmp_path / 'run'}")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert steps_done(tmp_path / "run") == 2
    assert "alpha: dcpo-paper" in out and "; 2 ranks (cpu, gloo)" in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_ranks_of_every_host_and_the_run_is_saved_and_wants_to_be_started_again(
    stand_in, task, tmp_path, number
):
    run = tmp_path / "run"
    process = start(stand_in, "alpha,beta", *task, f"output={run}", "training.steps=100000", "checkpoint.every=100000")
    until = time.monotonic() + 90
    while steps_done(run) < 2 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 75, out + err
    assert f"{number.name}: passed on to 2 hosts" in err
    # No checkpoint was due: this one was written because the ranks were asked to stop.
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{steps_done(run):06d}"


def test_a_host_whose_rank_is_killed_is_named_and_the_other_ends_too(stand_in, task, tmp_path):
    import psutil

    run = tmp_path / "run"
    process = start(stand_in, "alpha,beta", *task, f"output={run}", "training.steps=100000")
    until = time.monotonic() + 90
    while steps_done(run) < 1 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    below = psutil.Process(process.pid).children(recursive=True)
    (rank,) = [p for p in below if "train" in p.cmdline() and p.environ().get("RANK") == "1"]
    rank.kill()
    out, err = process.communicate(timeout=90)
    assert re.search(r"error: host beta ended with exit code 137|error: host alpha ended with exit code 1\b", err), (
        out + err
    )
    assert process.returncode in (1, 137)
    assert not [p for p in below if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_bad_input_ends_with_2_and_the_sentence(stand_in, task, tmp_path):
    process = start(stand_in, "alpha,beta", *task, f"output={tmp_path / 'run'}", "training.stepps=3")
    out, err = process.communicate(timeout=90)
    assert process.returncode == 2, out + err
    assert re.search(r"^(alpha|beta): dcpo: error: .*training\.stepps", out, re.M), out + err


def test_a_host_that_cannot_be_reached_or_does_not_answer_is_named(stand_in, task, tmp_path):
    process = start(stand_in, "gone-1", *task, f"output={tmp_path / 'run'}")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "host gone-1: ssh could not connect" in err and "Connection refused" in out
    process = start(stand_in, "alpha,silent-1", *task, f"output={tmp_path / 'run'}", options=("--start-deadline", "3"))
    out, err = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "no answer within 3 s from silent-1" in err, out + err


def test_the_lines_for_the_hosts_are_printed_and_survive_a_shell(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("user@alpha # the first\n\nbeta\n")
    command = [
        sys.executable, ROOT / "tools" / "launch_cluster.py", "--hosts-file", hosts, "--nproc-per-node", "8", "--print",
        "--directory", tmp_path, "--python", "echo", "--", "data.files=[a b.jsonl]",
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert list(lines) == ["user@alpha", "beta"]
    said = subprocess.run(
        ["sh", "-c", lines["beta"]], capture_output=True, text=True, timeout=30, env=os.environ
    ).stdout
    assert (
        "--nnodes 2 --node-rank 1 --nproc-per-node 8 --master-addr alpha --master-port 29500 -- data.files=[a b.jsonl]"
        in said
    )


@pytest.mark.parametrize(
    "names, word", [("", "no host"), ("a,-oProxyCommand=x", "no host name"), ("a,b,a", "named 2 times")]
)
def test_a_list_of_hosts_that_cannot_be_meant_is_refused(names, word):
    with pytest.raises(ValueError, match=word):
        read_hosts(names, None)


@pytest.mark.parametrize(
    "places, chosen",
    [
        (["no-such-name.invalid", "192.0.2.1"], "192.0.2.1"),
        (["localhost", "fd00::1"], "fd00::1"),  # a name for the loopback leads to no other host
        (["192.0.2.1", "192.0.2.2"], "192.0.2.1"),
        (["localhost"], "localhost"),  # the first host itself may know no better
        (["a" * 70], None),
    ],
)
def test_ranks_meet_at_the_first_place_that_their_host_knows(places, chosen):
    assert choose_address(places) == chosen


def test_the_first_host_is_looked_for_by_its_name_by_that_of_sshs_configuration_and_by_its_address(tmp_path):
    if not shutil.which("ssh"):
        pytest.skip("ssh is not installed")
    (tmp_path / "config").write_text("Host a\n  HostName 192.0.2.7\nHost b\n  HostName localhost\n")
    ssh = ["ssh", "-F", str(tmp_path / "config")]
    assert meeting_places(ssh, "user@a") == ["a", "192.0.2.7"]
    assert meeting_places(ssh, "b") == ["b", "localhost"]
    assert meeting_places(["not-ssh"], "192.0.2.7") == ["192.0.2.7"]


def test_a_host_that_hears_nothing_more_of_the_launcher_asks_its_ranks_to_save_and_end():
    program = """
import os, subprocess, sys, threading, time
from dcpo_megatron.launch.ssh_node import _obey
rank = subprocess.Popen(
    [sys.executable, "-c",
     "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print(flush=True); time.sleep(60)"],
    stdout=subprocess.PIPE,
)
rank.stdout.readline()
orders, launcher = os.pipe()  # stays open: the connection does not end
threading.Timer(1.5, os.write, [launcher, b"\\n"]).start()
began = time.monotonic()
_obey(orders, 3.0, threading.Event())
print(rank.wait(10), time.monotonic() - began > 4.0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.split() == ["75", "True"], done.stderr
    assert "the launcher or the way to it is gone" in done.stderr


def test_what_a_host_writes_when_nobody_reads_any_more_is_no_error():
    program = """
import os, sys, threading
from dcpo_megatron.launch.ssh_node import _relay_output
relay = _relay_output(threading.Event())
print("here", flush=True)
sys.stdin.read()
for line in range(10000):
    print("a line that a rank writes, and nobody reads", flush=True)
os._exit(7)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout.readline() == b"here\n"
    process.stdout.close()
    process.stdin.close()
    assert process.wait(30) == 7
