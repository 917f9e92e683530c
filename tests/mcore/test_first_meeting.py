"""Ranks meet for the first time when each has imported everything: that takes as long as it takes, and is not a
collective's deadline."""

import multiprocessing
import os
import re
import time

import pytest
import torch.distributed as dist

from dcpo_megatron.mcore import platform as platforms
from dcpo_megatron.network import free_port


def _rank(rank: int, world: int, port: int, late: float, answers) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    time.sleep(late)
    try:
        platforms.start(platforms.select_platform("cpu"), 1.0)
        dist.barrier()
        answers.put((rank, dist.get_world_size()))
        dist.barrier()
    except Exception as error:
        answers.put((rank, str(error)))


def meeting(world: int, late: dict[int, float]) -> dict[int, object]:
    """What each rank that comes says."""
    context = multiprocessing.get_context("fork")  # imported already
    answers, port = context.Queue(), free_port()
    ranks = [
        context.Process(target=_rank, args=(rank, world, port, seconds, answers)) for rank, seconds in late.items()
    ]
    for rank in ranks:
        rank.start()
    try:
        return dict(answers.get(timeout=60) for _ in ranks)
    finally:
        for rank in ranks:
            rank.join(20)
            rank.kill()


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    platforms.prepare(platforms.select_platform("cpu"))  # once, for all ranks
    monkeypatch.setattr(platforms, "prepare", lambda platform: None)


def test_a_rank_that_starts_later_than_a_collective_may_last_is_waited_for():
    assert meeting(2, {0: 0.0, 1: 3.0}) == {0: 2, 1: 2}


def test_ranks_that_never_start_are_named_to_all_that_are_there(monkeypatch):
    monkeypatch.setattr(platforms, "FIRST_MEETING_SECONDS", 2.0)
    said = meeting(5, {0: 0.0, 2: 0.5})
    assert said[0] == said[2] and said[0].startswith(
        "the run has not started: ranks 1, 3-4 of 5 did not come to 127.0.0.1:"
    )
    assert " within 2 s of rank 0's start (here: ranks 0, 2 on " in said[0]


def test_without_rank_0_each_says_where_it_looked(monkeypatch):
    monkeypatch.setattr(platforms, "FIRST_MEETING_SECONDS", 1.0)
    (said,) = meeting(2, {1: 0.0}).values()
    assert re.match(
        r"the run has not started: rank 1 on \S+ has not found rank 0 at 127.0.0.1:\d+ within 1 s: nobody listens", said
    )
