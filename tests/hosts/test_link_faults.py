"""The link of a host goes down in each phase of a run, for ever or for a while; a host disappears. Each rank says one
sentence, and the run goes on when it is started again."""

import tempfile
import time
from pathlib import Path

import pytest

from dcpo_megatron.verification import resumption
from tests.hosts.runs import Run, one_sentence, report
from tools import link_cuts

# The watchdog's deadline here, and what looking around and a busy machine may add until the last rank has spoken.
DEADLINE, SLACK = 8.0, 15.0
RESUME = "this run is stopped; .*start the same command again to resume"


def cut(host, way: str) -> None:
    host.pull_the_plug() if way == "down" else host.fall_silent()


def lost(run: Run, way: str, phase: str, seconds: float = DEADLINE + SLACK) -> None:
    """Cuts host 2 in ``phase``, and sees both ranks say who is missing, and the run end."""
    run.wait_for_step(5)  # the checkpoint of step 2 is complete
    met = run.wait_for_phase(phase)
    cut(run.hosts[1], way)
    ranks = run.end(seconds)
    report(f"link of h2 {way} while {met}", DEADLINE, ranks)
    waits = r"rank 0 on host h1 has waited in phase \w+ of step \d+ since \d\d:\d\d:\d\d \(\d+ s"
    print(
        one_sentence(ranks[0], "^rank 1 on host h2 cannot be reached over the network", waits, RESUME, "see to host h2")
    )
    if way == "down":  # this host can see it
        one_sentence(ranks[1], r"^rank 1 on host h2 is cut off from the network \(the link of eth0 is down\)", RESUME)
    else:
        one_sentence(ranks[1], "^rank 0 on host h1 cannot be reached over the network", RESUME)
    assert [rank.code for rank in ranks] == [70, 70]


def again(run: Run) -> None:
    """The last checkpoint is whole, and the same command goes on from it."""
    step = run.whole()
    assert step > 0
    run.hosts[1].plug_in()
    run.start().wait_for_step(step + 4)
    assert f"resumed from {run.output}/checkpoints/step-{step:06d}" in run.logs[0].read_text()


def test_a_link_that_goes_down_for_ever_is_named_on_both_sides(make_hosts):
    run = Run(make_hosts(2), f"training.timeout_seconds={DEADLINE}").start()
    lost(run, "down", "update")
    assert run.whole() > 0


@pytest.mark.thorough
@pytest.mark.parametrize("phase", ["rollout", "update", "saving"])
@pytest.mark.parametrize("way", ["down", "silent"])
def test_a_link_lost_in_any_phase(make_hosts, way, phase):
    settings = [
        f"training.timeout_seconds={DEADLINE}",
        "training.micro_batch_tokens=32",
        "rollout.max_response_tokens=24",
    ]
    run = Run(make_hosts(2), *settings, "checkpoint.timeout_seconds=20").start()
    # A checkpoint may take its own time beside the phase's; its collectives may not.
    lost(run, way, phase)
    again(run)


@pytest.mark.thorough
def test_cuts_of_five_seconds_cost_the_run_nothing_but_time(make_hosts):
    hosts = make_hosts(2)
    steps, beside = 40, ["training.micro_batch_tokens=32", "rollout.max_response_tokens=24"]
    quiet = Run(hosts, *beside, steps=steps, name="quiet").start()
    quiet.finish()
    run = Run(hosts, *beside, "training.timeout_seconds=60", steps=steps).start()
    run.wait_for_step(2)
    for way in ("down", "silent"):
        for phase in ("rollout", "update", "saving"):
            met = run.wait_for_phase(phase)
            began, at = time.monotonic(), run.steps()
            cut(hosts[1], way)
            time.sleep(5)
            hosts[1].plug_in()
            run.wait_for_step(at + 2, 60)
            print(f"\nlink of h2 {way} for 5 s while {met}: the run went on after {time.monotonic() - began:.1f} s")
    run.finish()
    print(resumption.compare(quiet.output, run.output))


@pytest.mark.thorough
def test_a_host_that_disappears_is_named_and_boots_again(make_hosts):
    run = Run(make_hosts(2), f"training.timeout_seconds={DEADLINE}").start()
    run.wait_for_step(5)  # the checkpoint of step 2 is complete
    run.hosts[1].disappear()
    (first, second) = run.end(DEADLINE + SLACK)
    report("host h2 disappears", DEADLINE, [first])
    print(one_sentence(first, "^rank 1 on host h2 (cannot be reached|is gone)", RESUME))
    assert first.code in (1, 70) and second.code
    run.hosts[1].start()
    again(run)


@pytest.mark.thorough
def test_a_process_killed_on_another_host_is_named_at_once(make_hosts):
    run = Run(make_hosts(2), "training.timeout_seconds=120").start()
    run.wait_for_step(5)  # the checkpoint of step 2 is complete
    run.processes[1].kill()
    first, _ = run.end(30)
    report("rank 1 killed on h2", 120, [first])
    one_sentence(first, "^rank 1 on host h2 is gone: its process has ended; it was last seen in phase", RESUME)
    again(run)


@pytest.mark.thorough
def test_of_three_hosts_the_one_that_is_cut_off_is_named_by_all_over_ipv6_too(make_hosts):
    hosts = make_hosts(3)
    for host in hosts:  # nothing but IPv6 between them
        host.call("ip", "-4", "address", "flush", "dev", "eth0")
    settings = [f"training.timeout_seconds={DEADLINE}", "rollout.prompts_per_step=6", "training.minibatch_prompts=3"]
    run = Run(hosts, *settings, master=hosts[0].ipv6).start()
    run.wait_for_step(5)  # the checkpoint of step 2 is complete
    hosts[1].fall_silent()
    ranks = run.end(DEADLINE + SLACK)
    report("h2 of three silent", DEADLINE, ranks)
    for rank in (ranks[0], ranks[2]):
        one_sentence(rank, r"^rank 1 on host h2 cannot be reached over the network \(no answer from fd77::2\)", RESUME)
    one_sentence(
        ranks[1],
        r"^rank 1 on host h2 is cut off from the network \(no other host answers\): rank 0 on host h1, rank 2 on host "
        r"h3",
    )


@pytest.mark.thorough
def test_connections_that_a_closed_port_holds_up_are_told_from_a_host_that_is_lost(make_hosts):
    run = Run(make_hosts(2), f"training.timeout_seconds={DEADLINE}").start()
    run.wait_for_step(5)
    first, second = run.hosts
    lines = second.call("ss", "-tnH", "state", "established", "dst", first.ipv4).stdout.splitlines()
    assert lines
    for line in lines:
        (own, other) = (place.rpartition(":")[2] for place in line.split()[2:4])
        second.call("ip", "rule", "add", "to", first.ipv4, "ipproto", "tcp", "sport", own, "dport", other, "prohibit")
    ranks = run.end(DEADLINE + SLACK)
    report(f"{len(lines)} ports closed", DEADLINE, ranks)
    for rank in ranks:
        print(
            one_sentence(
                rank,
                "a connection between two of them is stuck|waited too long for another rank, and all ranks answer",
                RESUME,
            )
        )
        assert "cannot be reached" not in rank.sentences[0] and rank.code == 70


@pytest.mark.thorough
@pytest.mark.timeout(1800)
def test_a_run_whose_links_are_cut_again_and_again_ends_bit_for_bit_as_an_undisturbed_one(namespaces):
    said: list[str] = []
    with tempfile.TemporaryDirectory(prefix="cuts-", dir="/tmp") as folder:
        link_cuts.verify(Path(folder), hosts=2, cuts=3, steps=55, seed=1, say=said.append)
    assert len(said) == 5 and "are equal bit for bit" in said[-1], said
