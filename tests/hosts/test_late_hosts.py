"""A host that comes late, or never: everyone who is there is told who is missing, since when, and what to do. Before
any word of torch's."""

import re
import sys
import time

import pytest

from dcpo_megatron.verification.resumption import make_task
from tests.hosts.starts import places, started


@pytest.fixture(scope="module")
def three(namespaces):
    with started(3) as found:
        yield found


def start(starters, ranks, wanted=(0, 1, 2), late=None, **deadlines) -> dict[int, str | dict]:
    """The answers of those ``wanted``, each on its host: sentences as text."""
    for rank in wanted:
        starters[rank].ask(ranks[rank], late=(late or {}).get(rank, 0.0), **deadlines)
    answers = {rank: starters[rank].answer() for rank in wanted}
    return {rank: answer.get("failed", answer) for rank, answer in answers.items()}


def test_hosts_that_come_late_are_waited_for_and_those_that_do_not_are_named(three):
    _, starters = three
    met = {"sum": 3, "interface": "eth0"}
    # Later than a collective may last: the last one, and the master.
    for late in ({2: 3.0}, {0: 3.0}):
        assert start(starters, places(3, "h1"), late=late, collective=1.5) == dict.fromkeys(range(3), met)

    began = time.monotonic()
    said = start(starters, places(3, "10.77.0.1", 29901), (0, 1), meeting=3.0)
    assert said[0] == said[1] and time.monotonic() - began < 3.0 + 6
    assert re.fullmatch(
        r"the run has not started: rank 2 of 3 \(node 2\) did not come to 10.77.0.1:29901 within 3 s of rank \d's"
        r" start "
        r"\(here: rank 0 on h1, rank 1 on h2\): start them, or look at their output and hosts; more time:"
        r" training.start_timeout_seconds",
        said[0],
    )
    # Where the launcher knows names, they are said.
    ranks = [rank | {"DCPO_HOSTS": "h1,h2,h3"} for rank in places(3, "10.77.0.1")]
    assert "ranks 1-2 of 3 (node 1: h2, 2: h3) did not come" in start(starters, ranks, (0,), meeting=1.0)[0]


def test_without_a_master_each_says_what_it_found_in_its_place(three):
    _, starters = three
    for master, reason in (
        ("10.77.0.1", "its host is up and nobody listens: start rank 0 there"),
        ("10.77.0.99", "no way there ("),
        ("fd77::99", "no way there ("),
        ("h9", "MASTER_ADDR=h9 does not resolve on h2: give the address of rank 0's host"),
        ("h2", "nobody listens, and h2 is h2 itself: has rank 0 started here, and is it to be here?"),
    ):
        said = start(starters, places(3, master), (1,), meeting=0.5)[1]
        assert said.startswith("the run has not started: rank 1 on h2 has not found rank 0 at "), said
        assert reason in said and "within 0.5 s" in said, said
    # Rank 0 has another address than the others look for.
    said = start(starters, places(3, "h2"), (0,), meeting=1.0)[0]
    assert (
        "ranks 1-2 of 3 (nodes 1-2) did not come" in said
        and "MASTER_ADDR=h2 is no address of h1, where rank 0 is" in said
    )


@pytest.mark.thorough
def test_a_master_that_goes_while_others_wait_is_named(three):
    hosts, starters = three
    for rank in (0, 1, 2):
        starters[rank].ask(places(4, "10.77.0.1", 29902)[rank], meeting=5.0, killed=None if rank else 3.0)
    time.sleep(2.0)
    hosts[2].fall_silent()
    began = time.monotonic()
    said = [starters[rank].answer()["failed"] for rank in (1, 2)]
    hosts[2].plug_in()
    assert "the store beside rank 0, at 10.77.0.1:29902, was there and is gone" in said[0]
    assert "the store beside rank 0, at 10.77.0.1:29902, has stopped answering rank 2 on h3 (5 s are over)" in said[1]
    assert time.monotonic() - began < 5 + 12


def test_ranks_that_are_there_twice_and_ports_that_are_taken_are_said(three):
    _, starters = three
    first = places(3, "10.77.0.1", 29903)
    starters[0].ask(first[0], meeting=20.0)
    starters[1].ask(first[1], meeting=20.0)
    time.sleep(1.5)
    # NODE_RANK of the second host given to the third too; then the master's.
    again = start([*starters[:1], starters[2]], [first[0], first[1]], (0, 1))
    assert "rank 0 on h1 cannot open its store at port 29903 (in use: another run, or what is left of one)" in again[0]
    assert "rank 1 is there twice at 10.77.0.1:29903, on h2 (process " in again[1] and "NODE_RANK" in again[1]
    starters[2].ask(first[2])
    assert [starter.answer() for starter in starters] == [{"sum": 3, "interface": "eth0"}] * 3
    # One that was killed while it waited, and is started again, has its place.
    starters[0].ask(places(2, "10.77.0.1", 29904)[0])
    starters[1].ask(places(2, "10.77.0.1", 29904)[1] | {"WORLD_SIZE": "3"}, killed=1.5)
    time.sleep(3.0)
    starters[1].ask(places(2, "10.77.0.1", 29904)[1])
    assert [starter.answer() for starter in starters[:2]] == [{"sum": 2, "interface": "eth0"}] * 2


@pytest.mark.thorough
def test_what_bash_started_ends_with_the_sentence_where_the_other_host_does_not_come(make_hosts):
    hosts = make_hosts(2)
    task = make_task(hosts.shared / "task", steps=1)
    variables = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "h1", "NPROC_PER_NODE": "2", "PYTHON": sys.executable}
    done = hosts[0].call(
        "bash", "examples/pretrain_dcpo.sh", *task, f"output={hosts.shared / 'run'}",
        "training.start_timeout_seconds=15",
        env=variables, check=False, timeout=240,
    )  # fmt: skip
    said = done.stdout.splitlines()
    assert done.returncode == 1 and "Traceback" not in done.stdout, done.stdout
    errors = [line for line in said if line.startswith("dcpo: error:")]
    assert re.match(
        r"dcpo: error: (rank 1: )?the run has not started: ranks 2-3 of 4 \(node 1\) did not come to h1:29500 within"
        r" 15 s",
        errors[0],
    )
