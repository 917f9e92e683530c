"""The shipped job script with servers: one of two nodes trains, the other samples, each on the CPU."""

import json
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from dcpo_megatron.verification.resumption import make_task
from tests.sglang_servers import server_options

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.sglang


def serving_on(port: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if "--port" in words and str(port) in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def test_a_job_trains_on_one_node_and_samples_on_the_other_and_leaves_no_server(cluster, tmp_path):
    options = " ".join(["--device", "cpu", *server_options(), "--", "--max-running-requests", "16"])
    task = make_task(tmp_path / "task", steps=3)
    run = tmp_path / "run"
    # An earlier start was killed before it could take its address back: waiting for that server would take all of the
    # test's time.
    (run / "servers").mkdir(parents=True)
    (run / "servers" / "n1.json").write_text('["http://127.0.0.1:9"]')
    variables = f"ALL,SERVER_NODES=1,SERVER_MODEL={tmp_path}/task/start,SERVE_OPTIONS={options}"
    job = cluster.submit(
        ROOT / "examples" / "slurm" / "train.sbatch", str(run), *task, "optimizer.warmup_steps=0",
        options=(f"--output={tmp_path}/job.log", f"--export={variables}"), cwd=ROOT,
    )  # fmt: skip
    waiting = ("PENDING", "RUNNING")
    cluster.wait(
        job, lambda facts: (run / "metrics.jsonl").is_file() or facts["JobState"] not in waiting, 150, "the first step"
    )
    cores = cluster.cores(job)
    facts = cluster.wait_for_the_end(job, 150)
    logs = {file.name: file.read_text() for file in [tmp_path / "job.log", *(run / "logs" / job).glob("*.log")]}
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "0"), logs
    assert cores == {"n1": 2, "n2": 2}, logs  # the rank's and the server's nodes, whole
    assert sorted(logs) == ["job.log", "rank-0.log", "serve-n2.log"]
    assert (run / "servers" / "api-key").stat().st_mode & 0o777 == 0o600
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # The third batch was sampled after two publications.
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert max(row["mismatch_abs_max"] for row in steps) < 1e-4
    (server,) = json.loads((run / "health" / "servers.json").read_text())["servers"]
    assert server["version"] == 3 and server["url"] != "http://127.0.0.1:9"
    deadline = time.monotonic() + 20
    while serving_on(urlsplit(server["url"]).port):
        assert time.monotonic() < deadline, "the server has outlived its job by 20 s"
        time.sleep(0.2)
    assert not (run / "servers" / "n2.json").exists()
