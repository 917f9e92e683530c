"""The shared folder is unmounted on a host while a run trains there, and comes back, or not; with the link down too;
before a start."""

import signal

import pytest

from tests.hosts.runs import Run, one_sentence, report
from tests.hosts.test_link_faults import DEADLINE, RESUME, SLACK

pytestmark = pytest.mark.thorough


@pytest.mark.parametrize("host", [0, 1])
def test_a_run_whose_shared_folder_goes_away_goes_on_and_saves_when_it_is_back(make_hosts, host):
    run = Run(make_hosts(2), "training.timeout_seconds=60", steps=60).start()
    run.wait_for_step(5)
    run.wait_for_phase("saving")
    run.hosts[host].unmount_shared()
    before = run.whole()
    said = (
        f"checkpoint of step (\\d+) could not be written: .*{run.output}.*; training goes on, the next one tries again"
    )
    run.wait_for_line(0, said, 60)
    run.wait_for_line(host, "health cannot be written .*: no heartbeats", 20)
    assert run.whole() in (before, before + 2)  # one may have been complete already
    inside = run.hosts[host].call("find", run.output, check=False).stdout
    assert "checkpoints" not in inside, inside  # nothing is written to the disk below the mount point
    run.hosts[host].mount_shared()
    run.finish()
    assert run.whole() == 60
    assert (run.output / "metrics.jsonl").read_text().count("\n") == 60


def test_where_the_folder_is_gone_too_the_network_says_who_is_missing(make_hosts):
    hosts = make_hosts(2)
    run = Run(hosts, f"training.timeout_seconds={DEADLINE}").start()
    run.wait_for_step(5)
    for host in hosts:
        host.unmount_shared()
    hosts[1].fall_silent()
    ranks = run.end(DEADLINE + SLACK)
    report("h2 silent, no shared folder", DEADLINE, ranks)
    for here, there in ((0, 1), (1, 0)):
        words = f"^rank {there} on host h{there + 1} cannot be reached over the network"
        assert "never began" not in one_sentence(ranks[here], words, RESUME)
    assert [rank.code for rank in ranks] == [70, 70]
    for host in hosts:
        host.mount_shared()
    step = run.whole()
    hosts[1].plug_in()
    run.start().wait_for_step(step + 4)


def test_a_rank_that_stands_still_without_the_folder_says_that_it_cannot_tell_who_is_behind(make_hosts):
    hosts = make_hosts(2)
    run = Run(hosts, f"training.timeout_seconds={DEADLINE}").start()
    run.wait_for_step(5)
    hosts[0].unmount_shared()
    run.processes[1].send_signal(signal.SIGSTOP)
    try:
        first = run.end_of(0, DEADLINE + SLACK)
    finally:
        run.processes[1].kill()
    report("rank 1 stopped, no shared folder on h1", DEADLINE, [first])
    # In a phase of its own deadline the collective's time is over first.
    words = "answer, and which of them is behind cannot be told|waited too long for another rank, and all ranks answer"
    one_sentence(first, "^rank 0 on host h1 ", words, "cannot be read on this host", r"in phase \w+ of step \d+ since")
    assert first.code == 70


def test_a_start_without_the_folder_on_one_host_is_refused_and_no_checkpoint_is_touched(make_hosts):
    hosts = make_hosts(2)
    run = Run(hosts, steps=4).start()
    run.finish()
    before = sorted(path.name for path in (run.output / "checkpoints").iterdir())
    hosts[1].call("cp", "-r", hosts.shared / "task", "/tmp/task")
    hosts[1].unmount_shared()
    hosts[1].call("cp", "-r", "/tmp/task", hosts.shared)
    run.arguments += ["training.steps=8"]
    run.start()
    ranks = run.end(240)
    for rank in ranks:
        one_sentence(rank, "^rank 1 on host h2 does not see what rank 0 on host h1 writes to output=", "mounted")
        assert rank.code == 2
    assert sorted(path.name for path in (run.output / "checkpoints").iterdir()) == before
    hosts[1].mount_shared()
    run.start().finish()
    assert "resumed from" in run.logs[0].read_text()
