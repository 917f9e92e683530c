"""Every way to start a run that README.md and docs/slurm.md name, on hosts: a rank or two on each train a small model
for two steps."""

import shutil
import sys
import time
from pathlib import Path

import pytest

from dcpo_megatron.verification.resumption import make_task, steps_done
from tests.hosts import ssh
from tests.hosts.machines import Host, HostProcess, Hosts, wait_until
from tests.slurm.cluster import Cluster
from tests.slurm.cluster import install as install_slurm

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "pretrain_dcpo.sh"
DEADLINE = 300.0  # the machine may be busy with other tests
PARTED = "tensor-parallel groups are on several hosts"


def task_of(hosts: Hosts, steps: int = 2) -> list[str]:
    return [*make_task(hosts.shared / "task", steps=steps), f"output={hosts.shared / 'run'}"]


def know_only_themselves(hosts: Hosts) -> None:
    """A host's name resolves on that host alone, as containers have it."""
    for host in hosts:
        host.names("none")
        host.call("sh", "-c", f"echo {host.ipv4} {host.name} >> /etc/hosts")


def start(host: Host, *command, env: dict[str, str] | None = None) -> HostProcess:
    """``command`` on ``host``, its output in a file of that name beside the run."""
    with (host._hosts.shared / f"{host.name}.log").open("w") as log:
        return host.popen(*command, env={"PYTHON": sys.executable} | (env or {}), stdout=log, stderr=log)


def said(hosts: Hosts) -> str:
    return "\n".join(f"{file.stem}: {file.read_text()}" for file in sorted(hosts.shared.glob("*.log")))


def ends_well(hosts: Hosts, processes: list[HostProcess], ranks: int) -> str:
    """What all have said, once they have trained to the end on so many ranks."""
    until = time.monotonic() + DEADLINE
    for process in processes:
        process.wait(max(1.0, until - time.monotonic()))
    text = said(hosts)
    assert [process.returncode for process in processes] == [0] * len(processes), text
    assert steps_done(hosts.shared / "run") == 2 and f"; {ranks} ranks (cpu, gloo)" in text, text
    return text


def by_bash(hosts: Hosts, *task: str, master: str = "h1") -> list[HostProcess]:
    """The same line on each host, with its number."""
    variables = {"NNODES": str(len(hosts.all)), "MASTER_ADDR": master, "NPROC_PER_NODE": "1"}
    return [start(host, "bash", SCRIPT, *task, env=variables | {"NODE_RANK": str(host.number - 1)}) for host in hosts]


def test_two_hosts_started_by_bash_train_one_model_and_hear_that_its_halves_are_on_different_hosts(make_hosts):
    hosts = make_hosts(2)
    text = ends_well(hosts, by_bash(hosts, *task_of(hosts), "parallel.tensor=2"), 2)
    assert text.count(f"warning: 1 of 1 {PARTED} (rank 0 is on h1, rank 1 of its group on h2)") == 1
    assert "parallel.tensor=2 does not divide the one rank of host h1" in text


@pytest.mark.thorough
def test_three_hosts_started_by_bash_meet_at_an_ipv6_address(make_hosts):
    hosts = make_hosts(3)
    task = [*task_of(hosts), "training.minibatch_prompts=8", "rollout.group_size=3"]
    assert PARTED not in ends_well(hosts, by_bash(hosts, *task, master=hosts[0].ipv6), 3)


def by_torchrun(hosts: Hosts, *task: str, master: str, options=lambda host: ()) -> list[HostProcess]:
    """README's line."""
    line = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", len(hosts.all), "--nproc-per-node", "1",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{master}:29500", "--rdzv-id", "JOB",
    ]  # fmt: skip
    return [start(host, *line, *options(host), SCRIPT, *task) for host in hosts]


@pytest.mark.thorough
@pytest.mark.parametrize("count", [2, 3])
def test_hosts_started_by_torchrun_meet_by_the_first_ones_name(make_hosts, count):
    hosts = make_hosts(count)
    task = [*task_of(hosts), "training.minibatch_prompts=8", "rollout.group_size=3"]
    ends_well(hosts, by_torchrun(hosts, *task, master="h1"), count)


@pytest.mark.thorough
def test_hosts_that_do_not_know_each_others_names_are_started_by_torchrun_with_addresses(make_hosts):
    hosts = make_hosts(2)
    know_only_themselves(hosts)

    def options(host):
        return "--local-addr", host.ipv6, "--rdzv-conf", f"is_host={host is hosts[0]}"

    ends_well(hosts, by_torchrun(hosts, *task_of(hosts), master=f"[{hosts[0].ipv6}]", options=options), 2)


@pytest.fixture
def ssh_hosts(make_hosts):
    """Hosts with sshd, but for the last one: that is where a user types. ``a`` and ``b`` are names that only ssh's
    configuration knows."""

    def make(count: int) -> Hosts:
        ssh.install()
        hosts = make_hosts(count + 1)
        client = "".join(f"Host {name}\n  HostName {host.ipv4}\n" for name, host in zip("abc", hosts))
        ssh.start_sshd(hosts, only=hosts.all[:count], client=client)
        return hosts

    return make


def by_ssh(hosts: Hosts, names: str, *task: str, options: tuple[str, ...] = ()) -> HostProcess:
    launcher = [
        ROOT / "tools" / "launch_cluster.py",
        "--hosts",
        names,
        "--nproc-per-node",
        "1",
        "--env",
        "OMP_NUM_THREADS=1",
    ]
    return start(hosts[-1], sys.executable, *launcher, *options, "--", *task)


@pytest.mark.thorough
@pytest.mark.parametrize("names", ["a,b", "h1,root@h2,h3"])
def test_hosts_started_by_ssh_from_elsewhere_train_one_model(ssh_hosts, names):
    count = len(names.split(","))
    hosts = ssh_hosts(count)
    task = [*task_of(hosts), "training.minibatch_prompts=8", "rollout.group_size=3"]
    text = ends_well(hosts, [by_ssh(hosts, names, *task)], count)
    assert f"{names.split(',')[0]}: dcpo-paper on qwen2" in text


def ranks_on(host: Host) -> bool:
    return host.call("pgrep", "-fc", "dcpo_megatron.cli train", check=False).stdout.split() != ["0"]


@pytest.mark.thorough
@pytest.mark.parametrize("end", ["killed", "silent"])
def test_the_end_of_the_launcher_or_of_its_host_ends_the_ranks_of_every_host_and_the_run_is_saved(ssh_hosts, end):
    hosts = ssh_hosts(2)
    run, checkout = hosts.shared / "run", hosts.shared / "checkout"
    # Three minutes of silence are long for a test: a checkout of its own has less patience.
    shutil.copytree(ROOT / "dcpo_megatron", checkout / "dcpo_megatron", ignore=shutil.ignore_patterns("__pycache__"))
    node = checkout / "dcpo_megatron" / "launch" / "ssh_node.py"
    patient = node.read_text()
    node.write_text(patient.replace("GIVEN_UP_SECONDS = 180.0", "GIVEN_UP_SECONDS = 40.0"))
    assert node.read_text() != patient
    task = [*task_of(hosts, steps=100_000), "checkpoint.every=100000"]
    launcher = by_ssh(hosts, "h1,h2", *task, options=("--directory", str(checkout)))
    wait_until(lambda: steps_done(run) >= 2 or launcher.poll() is not None, DEADLINE, "step 2")
    assert launcher.poll() is None, said(hosts)
    if end == "killed":
        launcher.kill()
    else:
        hosts[-1].fall_silent()
    for host in hosts.all[:2]:
        wait_until(lambda host=host: not ranks_on(host), 100, f"the end of the ranks on {host.name}")
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{steps_done(run):06d}"


@pytest.mark.thorough
def test_a_host_that_ssh_does_not_reach_is_named_and_the_others_end(ssh_hosts):
    hosts = ssh_hosts(2)
    hosts[1].fall_silent()
    for name, reason in (("h2", "connect to host h2 port 22: "), ("nowhere", "Could not resolve hostname nowhere")):
        launcher = by_ssh(hosts, f"h1,{name}", *task_of(hosts))
        assert launcher.wait(DEADLINE) == 1, said(hosts)
        assert f"error: host {name}: ssh could not connect" in said(hosts) and reason in said(hosts)
        assert not ranks_on(hosts[0])


@pytest.mark.thorough
def test_a_meeting_place_that_a_host_does_not_know_is_said_by_it(ssh_hosts):
    hosts = ssh_hosts(1)
    launcher = by_ssh(hosts, "h1", *task_of(hosts), options=("--master-addr", "nowhere"))
    assert launcher.wait(DEADLINE) == 2, said(hosts)
    assert "h1: dcpo: error: host h1 does not know where ranks meet: nowhere does not resolve there" in said(hosts)


def by_slurm(hosts: Hosts, *task: str, options: tuple[str, ...] = ()) -> str:
    """The job's log and those of its ranks, once it has ended well: a slurmd on each host, slurmctld on the first."""
    install_slurm()
    folder = hosts.shared / "slurm"
    folder.mkdir()
    cluster = Cluster(folder, hosts.all)
    cluster.start()
    run = hosts.shared / "run"
    options = (f"--output={hosts.shared}/job.log", f"--nodes={len(hosts.all)}", *options)
    job = cluster.submit(ROOT / "examples" / "slurm" / "train.sbatch", str(run), *task, options=options, cwd=ROOT)
    facts = cluster.wait_for_the_end(job, DEADLINE)
    logs = [hosts.shared / "job.log", *sorted((run / "logs" / job).glob("rank-*.log"))]
    text = "\n".join(f"{file.name}: {file.read_text()}" for file in logs if file.exists())
    assert facts["JobState"] == "COMPLETED", text
    assert steps_done(run) == 2
    return text


@pytest.mark.thorough
def test_a_slurm_job_on_two_nodes_meets_where_hosts_know_only_their_own_names_and_tells_of_a_cyclic_distribution(
    make_hosts,
):
    hosts = make_hosts(2)
    know_only_themselves(hosts)
    *task, _ = task_of(hosts)
    text = by_slurm(hosts, *task, "parallel.tensor=2", options=("--ntasks-per-node=2", "--distribution=cyclic"))
    assert "; 4 ranks (cpu, gloo)" in text
    assert f"warning: 2 of 2 {PARTED} (rank 0 is on h1, rank 1 of its group on h2)" in text
    assert "Slurm: --distribution=block" in text


@pytest.mark.thorough
def test_a_slurm_job_on_three_nodes_has_its_tensor_parallel_ranks_together(make_hosts):
    hosts = make_hosts(3)
    *task, _ = task_of(hosts)
    more = ("parallel.tensor=2", "training.minibatch_prompts=8", "rollout.group_size=3")
    text = by_slurm(hosts, *task, *more, options=("--ntasks-per-node=2",))
    assert "; 6 ranks (cpu, gloo)" in text and PARTED not in text
