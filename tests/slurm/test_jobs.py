"""The shipped job scripts, submitted to a real Slurm of two nodes: a rank on each trains a small model on the CPU."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from dcpo_megatron.verification.resumption import compare, make_task, steps_done

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples" / "slurm"
STEPS = 30


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> list[str]:
    return make_task(tmp_path_factory.mktemp("task"), steps=STEPS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


def submit(cluster, folder: Path, script: str, *arguments: str, options: tuple[str, ...] = ()) -> str:
    # From the checkout, as a user does it; the job's own log goes where the test can read it.
    where = (f"--output={folder}/job-%j.log", *options)
    return cluster.submit(SCRIPTS / script, *arguments, options=where, cwd=ROOT)


def log_of(folder: Path, job: str) -> str:
    return (folder / f"job-{job}.log").read_text()


@pytest.fixture(scope="module")
def undisturbed(cluster, folder, task) -> tuple[Path, str]:
    run = folder / "undisturbed"
    job = submit(cluster, folder, "train.sbatch", str(run), *task)
    facts = cluster.wait_for_the_end(job)
    assert facts["JobState"] == "COMPLETED", log_of(folder, job)
    return run, job


def test_a_job_on_two_nodes_trains_to_the_end_with_a_log_for_each_rank(undisturbed, folder, cluster):
    run, job = undisturbed
    assert steps_done(run) == STEPS
    facts = cluster.facts(job)
    assert (facts["NumNodes"], facts["NodeList"], facts["Restarts"]) == ("2", "n[1-2]", "0")
    logs = run / "logs" / job
    assert sorted(file.name for file in logs.iterdir()) == ["rank-0.log", "rank-1.log"]
    assert f"step {STEPS}" in (logs / "rank-0.log").read_text()
    # n1 is a name that nobody resolves: its address was asked for.
    assert "restart 0, 2 ranks of 2 cores on n[1-2] (servers on the last 0 nodes), meeting at 127.0.0.1:" in log_of(
        folder, job
    )


def test_a_job_warned_of_its_time_limit_and_then_preempted_ends_with_the_run_of_an_undisturbed_one_bit_for_bit(
    undisturbed, folder, cluster, task
):
    run = folder / "disturbed"
    job = submit(cluster, folder, "train.sbatch", str(run), *task)
    cluster.wait(job, lambda facts: steps_done(run) >= 3, 60, "step 3")
    # The signal that --signal=B:USR1@... sends, to the same shell.
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    cluster.wait(job, lambda facts: facts["Restarts"] == "1", 30, "the job's own requeue")
    # The ranks saved where they stood, not at a multiple of checkpoint.every that had passed.
    saved = (run / "checkpoints" / "latest").read_text()
    cluster.wait(job, lambda facts: facts["JobState"] == "RUNNING", 60, "the second start")
    first = steps_done(run)
    cluster.wait(job, lambda facts: steps_done(run) >= first + 3, 60, f"three steps after {first}")
    cluster.call("scontrol", "requeue", job)
    cluster.wait(job, lambda facts: facts["Restarts"] == "2", 30, "the requeue by the scheduler")
    facts = cluster.wait_for_the_end(job, 120)
    log = log_of(folder, job)
    assert facts["JobState"] == "COMPLETED", log
    assert saved.strip() == f"step-{first:06d}"
    for number in range(3):
        assert f"restart {number}," in log
    assert log.count("queued again") == 1
    assert f"step {STEPS}" in (run / "logs" / job / "rank-0.log").read_text()
    assert "bit for bit" in compare(undisturbed[0], run)


def test_a_job_that_is_cancelled_saves_and_is_not_queued_again(cluster, folder, task):
    run = folder / "cancelled"
    job = submit(cluster, folder, "train.sbatch", str(run), *task)
    cluster.wait(job, lambda facts: steps_done(run) >= 3, 60, "step 3")
    # A rank a node, each with all of its two cores; one core is what srun gives a task of itself.
    assert cluster.cores(job) == {"n[1-2]": 4}
    cluster.call("scancel", job)
    facts = cluster.wait_for_the_end(job)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")
    latest = json.loads(
        (run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip() / "run.json").read_text()
    )
    assert 3 <= latest["step"] < STEPS
    assert latest["step"] == steps_done(run)


def test_a_wrong_configuration_ends_the_job_once_with_its_sentence_in_the_log(cluster, folder, task):
    run = folder / "wrong"
    job = submit(cluster, folder, "train.sbatch", str(run), *task, "training.stepps=3")
    facts = cluster.wait_for_the_end(job)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0")
    assert "training.stepps" in (run / "logs" / job / "rank-0.log").read_text()
    assert f"the sentence is in {run}/logs/{job}/rank-0.log" in log_of(folder, job)


def test_an_array_trains_each_seed_in_a_folder_of_its_own(cluster, folder, task):
    runs = folder / "seeds"
    short = [word for word in task if not word.startswith(("training.steps", "training.seed"))]
    job = submit(
        cluster, folder, "seeds.sbatch", str(runs), *short, "training.steps=2", options=("--array=3,7",)
    )  # fmt: skip
    for seed in (3, 7):
        assert cluster.wait_for_the_end(f"{job}_{seed}")["JobState"] == "COMPLETED"
    rows = {seed: (runs / f"seed-{seed}" / "metrics.jsonl").read_text().splitlines() for seed in (3, 7)}
    rewards = {seed: [json.loads(row)["reward"] for row in lines] for seed, lines in rows.items()}
    assert [len(found) for found in rewards.values()] == [2, 2]
    assert rewards[3] != rewards[7]


def test_a_number_of_tasks_that_is_not_that_of_the_gpus_is_refused(tmp_path):
    # Pure shell before anything of Slurm is asked; this machine's nodes have no GPU to allocate.
    environment = {
        "PATH": "/usr/bin:/bin",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_NTASKS_PER_NODE": "4",
    }
    done = subprocess.run(
        ["bash", SCRIPTS / "train.sbatch", tmp_path / "run"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2
    assert "8 GPUs a node, but 4 tasks: give --ntasks-per-node=8" in done.stderr


def test_the_scripts_please_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", *sorted(SCRIPTS.glob("*.sbatch"))], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
