"""Ranks meet for the first time when each has imported everything: that takes as long as it takes, and is not a collective's deadline."""

import multiprocessing
import os
import time

import pytest
import torch.distributed as dist

from dcpo_megatron.cli.launch import free_port
from dcpo_megatron.mcore import platform as platforms


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


def test_ranks_that_never_start_end_the_others_with_a_sentence(monkeypatch):
    monkeypatch.setattr(platforms, "FIRST_MEETING_SECONDS", 1.5)
    said = meeting(4, {0: 0.0, 2: 0.0})
    assert all(answer.startswith("not all 4 ranks have started within 1.5 s (") for answer in said.values()), said
