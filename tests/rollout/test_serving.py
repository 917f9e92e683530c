"""The launcher with real SGLang servers: they start, hang, die, and are gone when they should be."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from dcpo_megatron.rollout.serving import ServingError
from dcpo_megatron.rollout.serving.supervisor import free_ports
from tests.sglang_servers import serve, server_options

TOOL = Path(__file__).resolve().parents[2] / "tools" / "serve_rollout.py"
KEY = "a-key-that-nobody-sees"
pytestmark = pytest.mark.sglang


def group(leader: int) -> list[psutil.Process]:
    """The processes of a server."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def shared_files(leader: int) -> set[str]:
    """The files of a server's load snapshots."""
    return {part.path for one in group(leader) for part in one.memory_maps() if part.path.startswith("/dev/shm/sglang")}


def until(condition, seconds: float, what: str):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come within {seconds} s"
        time.sleep(0.1)
    return value


class Launcher:
    """`tools/serve_rollout.py` with two servers, as a user or a job starts it."""

    def __init__(self, model: Path, folder: Path):
        self.addresses, self.logs, self.errors = folder / "addresses" / "a.json", folder / "logs", folder / "stderr"
        (folder / "key").write_text(KEY + "\n")
        command = [
            sys.executable, TOOL, model, "--servers", "2", "--device", "cpu", "--port", str(free_ports(1)[0]),
            "--api-key-file", folder / "key",
            "--address-file", self.addresses, "--logs", self.logs, "--hung-after", "6", *server_options(), "--",
            "--max-running-requests", "4",
        ]  # fmt: skip
        with self.errors.open("wb") as errors:
            # A proxy that answers nobody: servers speak to themselves past it.
            proxy = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy"), "http://127.0.0.1:9")
            self.process = subprocess.Popen([str(word) for word in command], stderr=errors, env=os.environ | proxy)

    def leaders(self) -> list[int]:
        """The process groups of its servers, in their order."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):  # has just been killed
                words = child.cmdline()
                found[words[words.index("--port") + 1]] = child.pid
        return [found[port] for port in sorted(found)]

    def said(self) -> str:
        return self.errors.read_text()

    def wait(self) -> list[str]:
        def ready():
            assert self.process.poll() is None, self.said()
            return self.addresses.is_file()

        until(ready, 180, "the address file")
        return json.loads(self.addresses.read_text())


@pytest.fixture(scope="module")
def launcher(demo_start, tmp_path_factory):
    running = Launcher(demo_start, tmp_path_factory.mktemp("launcher"))
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()


@pytest.fixture(scope="module")
def urls(launcher) -> list[str]:
    return launcher.wait()


def sample(url: str, key: str | None = KEY) -> httpx.Response:
    body = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}, "return_logprob": True}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{url}/generate", json=body, headers=headers, timeout=30)


def test_two_servers_sample_for_who_has_the_key_and_hold_weights_of_no_run(urls):
    assert len(urls) == 2
    for url in urls:
        answer = sample(url).json()
        assert len(answer["meta_info"]["output_token_logprobs"]) == 3
        assert answer["meta_info"]["weight_version"] == "unpublished"
        assert sample(url, None).status_code == sample(url, "another").status_code == 401


def test_the_key_is_in_no_command_line_no_environment_and_no_log(launcher, urls):
    processes = [process for leader in launcher.leaders() for process in group(leader)]
    assert len(processes) >= 2 * 4  # HTTP, scheduler, detokenizer, guardian
    for process in processes:
        assert KEY not in " ".join(process.cmdline()) and KEY not in str(process.environ())
    logs = [file.read_text() for file in launcher.logs.glob("*.log")]
    assert len(logs) == 2 and all("(hidden)" in text and KEY not in text for text in logs)
    assert all(file.stat().st_mode & 0o077 == 0 for file in launcher.logs.glob("*.log"))


def test_a_server_reaches_itself_past_a_proxy(launcher, urls):
    for file in launcher.logs.glob("*.log"):
        # Before this line it posts /freeze_gc to itself; without a warm-up it may do so before it listens, which is its
        # own affair.
        until(lambda: "fired up and ready" in file.read_text(), 20, "the server's own word")  # noqa: B023
        assert "ProxyError" not in file.read_text()


@pytest.fixture(scope="module")
def hung(launcher, urls) -> int:
    """The first server has hung: the launcher has said so, and starts another one while the tests go on. Its process
    group."""
    leader = launcher.leaders()[0]
    os.kill(leader, signal.SIGSTOP)
    until(lambda: "has not answered for 6 s: started again" in launcher.said(), 40, "the verdict")
    return leader


@pytest.fixture(scope="module")
def again(launcher, urls, hung) -> None:
    """It is there again."""
    until(lambda: f"{urls[0]} is ready again" in launcher.said(), 120, "the server")


def test_a_model_that_the_server_cannot_load_is_told_with_the_end_of_its_log(hung, demo_start, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    config = json.loads((demo_start / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps(config | {"model_type": "no-such-model", "architectures": ["NoSuchModel"]})
    )
    with pytest.raises(
        ServingError,
        match=r"(?s)server http://127.0.0.1:\d+ ended with .* while it started; the end of its log .*no-such-model",
    ):
        serve(model, logs=tmp_path / "logs").start()  # fmt: skip


def test_a_server_that_is_not_ready_in_time_is_named_and_ended(demo_start, tmp_path):
    running = serve(demo_start, logs=tmp_path, start_seconds=2.0)
    with pytest.raises(ServingError, match=rf"server {running.urls[0]} was not ready 2 s after its start"):
        running.start()
    assert not group(running.processes[0].pid)


def test_a_server_that_hangs_is_started_again_on_its_address(launcher, urls, hung, again):
    assert launcher.leaders()[0] != hung and not group(hung)
    assert sample(urls[0]).status_code == 200


def test_a_server_that_dies_three_times_is_left_alone_and_the_other_serves_on(launcher, urls, again):
    shared = shared_files(launcher.leaders()[1])
    for _ in range(3):
        victim = until(lambda: launcher.leaders()[1:2], 10, "the second server")[0]
        os.kill(victim, signal.SIGKILL)
        until(lambda: not group(victim), 10, "the end of what it had spawned")  # noqa: B023
    assert shared and not any(Path(name).exists() for name in shared)
    until(lambda: "for the 3rd time within 600 s: not started again" in launcher.said(), 10, "the verdict")
    assert len(launcher.leaders()) == 1
    assert sample(urls[0]).status_code == 200


def test_nothing_is_left_of_the_servers_when_their_launcher_is_killed(launcher, urls):
    leader = launcher.leaders()[0]
    processes = group(leader)
    assert len(processes) >= 4
    shared = shared_files(leader)
    launcher.process.kill()
    launcher.process.wait()
    until(lambda: not group(leader), 10, "the end of the server")
    assert shared and not any(Path(name).exists() for name in shared)


def test_a_launcher_that_is_asked_to_stop_while_servers_start_ends_with_them(demo_start, tmp_path):
    launcher = Launcher(demo_start, tmp_path)
    try:
        leaders = until(lambda: len(launcher.leaders()) == 2 and launcher.leaders(), 60, "the servers' processes")
        launcher.process.terminate()
        assert launcher.process.wait(20) == 0
    finally:
        launcher.process.kill()
        launcher.process.wait()
    assert "SIGTERM: all servers are stopped" in launcher.said()
    assert not any(group(leader) for leader in leaders) and not launcher.addresses.exists()
