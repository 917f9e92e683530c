"""A rank that was started otherwise than the others, from another checkout, or on the ports of another run: one
sentence on every rank, before anything is built."""

import shutil

import pytest

from tests.hosts.machines import CHECKOUT
from tests.hosts.runs import Run, one_sentence, report


def test_a_rank_with_another_configuration_is_refused_on_every_rank(make_hosts):
    hosts = make_hosts(2)
    run = Run(hosts, steps=2).start(more={1: ["optimizer.lr=0.5", "training.seed=3"]})
    ranks = run.end(240)
    for rank in ranks:
        print(one_sentence(
            rank, "^rank 1 on host h2 has another configuration than rank 0 on host h1: ",
            r"optimizer.lr is 0.5, on rank 0 0.001; ",
            "training.seed is 3, on rank 0 0: give every rank the same command$",
        ))  # fmt: skip
        assert rank.code == 2 and "Traceback" not in rank.log
    assert not (run.output / "checkpoints").exists()


@pytest.mark.thorough
def test_a_rank_from_another_checkout_is_refused_on_every_rank(make_hosts):
    hosts = make_hosts(2)
    other = hosts.shared / "other"
    shutil.copytree(CHECKOUT / "dcpo_megatron", other / "dcpo_megatron")
    with (other / "dcpo_megatron" / "files.py").open("a") as file:
        file.write("# of another day\n")
    run = Run(hosts, steps=2)
    run.start(env={1: {"PYTHONPATH": str(other)}}, cwd={1: other})
    for rank in run.end(240):
        one_sentence(
            rank,
            "^rank 1 on host h2 runs another version than rank 0 on host h1: sources of dcpo_megatron is '",
            "install the same on every host",
        )
        assert rank.code == 2 and "Traceback" not in rank.log


@pytest.mark.thorough
def test_of_two_runs_on_the_same_ports_the_second_says_so_and_the_first_goes_on(make_hosts):
    hosts = make_hosts(2)
    first = Run(hosts, name="first").start()
    first.wait_for_step(2)
    second = Run(hosts, steps=2, name="second").start()
    ranks = second.end(240)
    report("a second run on the same port", 0, ranks)
    print(one_sentence(ranks[0], "port 29500"))
    print(one_sentence(ranks[1], "29500"))
    assert all(rank.code for rank in ranks)
    first.wait_for_step(first_step := first.steps() + 2)
    assert first_step
