"""What the launcher refuses before anything is started, and the command lines that it would run."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dcpo_megatron.cli.serve import main
from dcpo_megatron.rollout.serving import ServerPlan, ServingError, gpus_for, start_servers
from dcpo_megatron.rollout.serving.command import MODULE, command_line, environment

PYTHON = (sys.executable,)


def refusal(capsys, *words: str) -> str:
    assert main([*words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_a_host_that_others_reach_needs_a_key_from_a_file_or_the_environment(demo_start, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("DCPO_SGLANG_API_KEY", raising=False)
    line = refusal(capsys, str(demo_start), "--python", sys.executable, "--host", "0.0.0.0")
    assert "--host 0.0.0.0" in line and "--api-key-file" in line and "127.0.0.1" in line
    start_servers(demo_start, command=PYTHON, device="cpu", host="0.0.0.0", api_key="k")  # nothing runs yet
    (tmp_path / "key").write_text("\n")
    for file, what in ((tmp_path / "key", "is empty"), (tmp_path / "none", "cannot be read")):
        assert what in refusal(capsys, str(demo_start), "--python", sys.executable, "--api-key-file", str(file))


def test_a_port_in_use_is_named_with_what_to_do(demo_start, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal(capsys, str(demo_start), "--python", sys.executable, "--port", str(port))
    assert f"port {port} is in use" in line and "--port" in line


def test_a_folder_without_a_model_and_a_host_without_gpus_are_refused(demo_start, tmp_path, monkeypatch, capsys):
    assert f"no model in {tmp_path}" in refusal(capsys, str(tmp_path), "--python", sys.executable)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    line = refusal(capsys, str(demo_start), "--python", sys.executable, "--servers", "2", "--tp", "2")
    assert "2 servers of 2 GPUs need 4, this host shows 3" in line
    with pytest.raises(ServingError, match="--tp 2 needs GPUs"):
        start_servers(demo_start, command=PYTHON, device="cpu", tp=2)


def test_an_interpreter_that_is_not_there_is_a_sentence_and_leaves_nothing(demo_start, tmp_path):
    with pytest.raises(ServingError, match=r"cannot be started.*nowhere/python"):
        start_servers(demo_start, command=["/nowhere/python"], device="cpu", logs=tmp_path).start()


def test_servers_take_neighbouring_gpus_and_what_the_user_says_comes_last():
    plan = ServerPlan(
        "M",
        ("apptainer", "exec", "python3"),
        "cuda",
        tp=4,
        colocated=True,
        arguments=("--dtype", "bfloat16"),
        api_key="secret",
    )
    words = command_line(plan, 1, 30001)
    assert words[:4] == ["apptainer", "exec", "python3", str(MODULE)]
    assert words[words.index("--base-gpu-id") + 1] == "4" and words[words.index("--tp-size") + 1] == "4"
    assert "--enable-memory-saver" in words and words[-2:] == ["--dtype", "bfloat16"]
    assert "secret" not in " ".join(words) and "secret" not in repr(plan)


def test_a_server_inherits_neither_the_rank_nor_the_import_path_nor_the_key_of_its_launcher():
    of = {"PYTHONPATH": "/trainer", "RANK": "1", "MASTER_ADDR": "a", "DCPO_SGLANG_API_KEY": "secret", "HOME": "/h"}
    cpu = environment(ServerPlan("M", PYTHON, "cpu"), 2, of)
    assert not cpu.keys() & {"PYTHONPATH", "RANK", "MASTER_ADDR", "DCPO_SGLANG_API_KEY"} and cpu["HOME"] == "/h"
    assert cpu["SGLANG_USE_CPU_ENGINE"] == "1"
    # What the user sets for the server's allocator stays.
    assert (
        environment(ServerPlan("M", PYTHON, "cpu"), 2, {"MALLOC_TRIM_THRESHOLD_": "7"})["MALLOC_TRIM_THRESHOLD_"] == "7"
    )
    cuda = environment(ServerPlan("M", PYTHON, "cuda", python_path="/wheel"), 2, of)
    assert "SGLANG_USE_CPU_ENGINE" not in cuda and cuda["PYTHONPATH"] == "/wheel"


def test_visible_devices_decide_how_many_gpus_there_are(monkeypatch):
    def count(device: str) -> int | None:
        found = gpus_for(device, None)
        return None if found is None else len(found)

    for value, auto, cuda in (("", None, 0), ("-1", None, 0), ("0", 1, 1), ("GPU-aa,GPU-bb", 2, 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert (count("auto"), count("cuda"), count("cpu")) == (auto, cuda, None)


def test_the_servers_module_asks_for_the_launchers_pipe():
    # What a container's command gives that does not pass standard input on.
    done = subprocess.run(
        [sys.executable, MODULE], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30,
        env=dict(os.environ)
    )  # fmt: skip
    assert done.returncode == 1 and "docker run -i" in done.stderr
    assert not Path(MODULE).read_text().count("dcpo_megatron.")  # the project is not installed where it runs
