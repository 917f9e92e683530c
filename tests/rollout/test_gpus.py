"""Which GPUs servers and ranks get on one host. The driver, and the servers themselves, are stand-ins: an 8-GPU host on
a machine that has none."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dcpo_megatron.cli.serve import main
from dcpo_megatron.gpus import VisibleGpu, choose, select, visible_gpus
from dcpo_megatron.rollout.serving import ServerPlan
from dcpo_megatron.rollout.serving.supervisor import addresses, free_ports
from tests.standins import pynvml

ROOT = Path(__file__).resolve().parents[2]
STAND_INS = ROOT / "tests" / "standins"
UUIDS = [pynvml.uuid(number) for number in range(8)]


@pytest.fixture
def eight(monkeypatch):
    """This process sees the driver of an 8-GPU host."""
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("visible", "numbers"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("4,5", [4, 5]),
        ("7, 2", [7, 2]),
        ("", []),
        ("-1", []),
        ("3,-1,4", [3]),
        ("0,9,1", [0]),  # CUDA stops at the first that is not there
        ("GPU-a6,1", [6, 1]),
        ("GPU-a,1", []),  # the beginning of several
    ],
)
def test_the_visible_gpus_are_those_that_cuda_would_show(eight, monkeypatch, visible, numbers):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.uuid for gpu in visible_gpus()] == [UUIDS[number] for number in numbers]


def test_without_a_driver_the_variable_is_believed():
    assert select("4,5,MIG-x", None) == [VisibleGpu("4", None), VisibleGpu("5", None), VisibleGpu("MIG-x", None)]
    assert select(None, None) == []


@pytest.mark.parametrize("wanted", ["4-7", "4,5,6,7", "4-5,6,7", ",".join(UUIDS[4:]), "GPU-a4,GPU-a5,6-7"])
def test_gpus_are_chosen_by_number_range_or_uuid(wanted):
    assert [gpu.uuid for gpu in choose(wanted, select(None, UUIDS))] == UUIDS[4:]


def test_numbers_are_among_the_visible_ones():
    assert [gpu.name for gpu in choose("1-2", select("3,5,7", UUIDS))] == ["5", "7"]


@pytest.mark.parametrize(
    ("options", "visible", "words"),
    [
        (["--servers", "4", "--tp", "2", "--gpus", "4-7"], None,
         "4 servers of 2 GPUs need 8, --gpus 4-7 names 4: give fewer --servers or --tp, or more"),
        (["--gpus", "6-9"], None, "--gpus 6-9: 6-9 is not among the 8 GPUs that are visible here, numbered from 0"),
        (["--gpus", "4"], "0,1",
         "--gpus 4: 4 is not among the 2 GPUs that are visible here, numbered from 0 (CUDA_VISIBLE_DEVICES=0,1)"),
        (["--gpus", "1,0-3"], None, "--gpus 1,0-3: GPU 1 is named twice"),
        (["--gpus", "7-4"], None, "7-4 is not among"),
        (["--gpus", "four"], None, "'four' names 0 of the 8 GPUs"),
        (["--gpus", "0", "--device", "cpu"], None, "--gpus 0, but --device cpu uses none"),
        (["--gpus", "0"], "", "--gpus 0, but this host shows no GPU"),
    ],
)  # fmt: skip
def test_gpus_that_are_not_there_or_too_few_are_refused_in_a_sentence(
    eight, demo_start, monkeypatch, capsys, options, visible, words
):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert main([str(demo_start), "--python", sys.executable, *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line


def test_servers_that_the_users_own_arguments_place_are_on_gpus_that_nobody_knows():
    plan = ServerPlan("M", ("python",), "cuda", tp=2, uuids=tuple(UUIDS))
    assert addresses(plan, ["a", "b"]) == [{"url": "a", "gpus": UUIDS[:2]}, {"url": "b", "gpus": UUIDS[2:4]}]
    moved = ServerPlan("M", ("python",), "cuda", uuids=tuple(UUIDS), arguments=("--base-gpu-id=4",))
    assert addresses(moved, ["a"]) == ["a"]
    assert addresses(ServerPlan("M", ("python",), "cpu"), ["a"]) == ["a"]


def on_eight_gpus(*words: str, **variables: str) -> subprocess.Popen:
    """A command as a user gives it, on the 8-GPU host."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(STAND_INS), str(ROOT)]), **variables}
    return subprocess.Popen(
        [*words], env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_the_servers_of_the_readme_are_on_gpus_4_to_7_and_say_so(demo_start, tmp_path):
    serve = on_eight_gpus(
        sys.executable, "-m", "dcpo_megatron.cli", "serve", str(demo_start), "--servers", "2", "--tp", "2", "--gpus",
        "4-7", "--colocated",
        "--command", f"{sys.executable} {STAND_INS / 'server.py'}", "--port", str(free_ports(1)[0]),
        "--address-file", str(tmp_path / "servers.json"), "--logs", str(tmp_path / "logs"),
        DCPO_TEST_SEEN=str(tmp_path),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "servers.json").is_file():
            assert serve.poll() is None, serve.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        servers = json.loads((tmp_path / "servers.json").read_text())
    finally:
        serve.terminate()
        serve.communicate(timeout=30)
    assert [server["gpus"] for server in servers] == [UUIDS[4:6], UUIDS[6:]]
    seen = [json.loads((tmp_path / f"{server['url'].rpartition(':')[2]}.json").read_text()) for server in servers]
    for number, start in enumerate(seen):
        assert start["CUDA_VISIBLE_DEVICES"] == "4,5,6,7" and start["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
        words = start["words"]
        assert (words[words.index("--base-gpu-id") + 1], words[words.index("--tp-size") + 1]) == (str(2 * number), "2")
        # Captured graphs can be released too.
        assert start["SGLANG_MEMORY_SAVER_CUDA_GRAPH"] == "true"


def test_the_ranks_of_the_readme_are_on_gpus_0_to_3(tmp_path):
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import os, pathlib\nfrom dcpo_megatron.gpus import visible_gpus\nnumber = int(os.environ['LOCAL_RANK'])\n"
        f"pathlib.Path({str(tmp_path)!r}, f'gpu-{{number}}').write_text(visible_gpus()[number].uuid)\n"
    )
    launch = f"import sys; from dcpo_megatron.launch.local import run_ranks; sys.exit(run_ranks(4, [{str(rank)!r}]))"
    done = on_eight_gpus(sys.executable, "-c", launch, CUDA_VISIBLE_DEVICES="0,1,2,3")
    said, _ = done.communicate(timeout=60)
    assert done.returncode == 0, said
    assert [(tmp_path / f"gpu-{number}").read_text() for number in range(4)] == UUIDS[:4]


@pytest.mark.parametrize(("visible", "ranks"), [("0,1,2,3", 4), (None, 8), ("", 1)])
def test_the_start_script_takes_as_many_ranks_as_gpus_are_visible(tmp_path, visible, ranks):
    # An interpreter that counts as the real one does, and starts nothing; nvidia-smi shows all eight, whatever the
    # variable says.
    shim, smi = tmp_path / "python", tmp_path / "nvidia-smi"
    shim.write_text(f'#!/usr/bin/env bash\n[ "$1" = -m ] && exec {sys.executable} "$@"\necho "started: $*"\n')
    smi.write_text("#!/usr/bin/env bash\nfor number in 0 1 2 3 4 5 6 7; do echo GPU $number; done\n")
    for file in (shim, smi):
        file.chmod(0o755)
    variables = {"PYTHON": str(shim), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    if visible is not None:
        variables["CUDA_VISIBLE_DEVICES"] = visible
    done = on_eight_gpus("bash", "examples/pretrain_dcpo.sh", "--config", "R", **variables)
    said, _ = done.communicate(timeout=60)
    assert said.strip() == f"started: {ROOT}/examples/pretrain_dcpo.sh --ranks {ranks} --config R"
