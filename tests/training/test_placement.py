"""What a run says of ranks that wait for each other in every layer and are on different hosts: groups as Megatron-Core
makes them."""

import pytest
from megatron.core.parallel_state import RankGenerator

from dcpo_megatron.training.placement import misplaced

HOSTS = {name: (name, f"{name} booted") for name in "abcd"}


def said(hosts: str, tensor: int = 1, context: int = 1, pipeline: int = 1, expert: int = 1) -> str | None:
    """``hosts``: a letter for each rank's host."""
    world = len(hosts)
    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(tensor, 1, world // (tensor * context * pipeline), pipeline, context, order=order)
    sparse = RankGenerator(tensor, expert, world // (tensor * expert * pipeline), pipeline, 1, order=order)
    groups = {
        "tensor": (dense, "tp"),
        "expert-tensor": (sparse, "tp"),
        "context": (dense, "cp"),
        "expert": (sparse, "ep"),
    }
    ranks = {kind: {tuple(group) for group in of.get_ranks(name)} for kind, (of, name) in groups.items()}
    return misplaced([HOSTS[letter] for letter in hosts], ranks)


@pytest.mark.parametrize(
    "hosts, layout",
    [
        ("aaaa", {"tensor": 4}),
        ("aabb", {"tensor": 2}),
        ("abab", {}),  # data-parallel ranks may be anywhere
        ("abab", {"pipeline": 2}),
        ("aabbaabb", {"tensor": 2}),
        ("aaaab", {}),
        ("aaaabb", {"tensor": 2}),
        # Context- and expert-parallel groups larger than what fits on a host beside their tensor-parallel ranks are as
        # they must be.
        ("aabbccdd", {"tensor": 2, "context": 2}),
        ("aabb", {"expert": 4}),
    ],
)
def test_a_placement_that_cannot_be_better_is_not_spoken_of(hosts, layout):
    assert said(hosts, **layout) is None


@pytest.mark.parametrize(
    "hosts, layout, words",
    [
        ("abab", {"tensor": 2},
         "2 of 2 tensor-parallel groups are on several hosts (rank 0 is on a, rank 1 of its group on b)"),
        ("abcabc", {"tensor": 2}, "3 of 3 tensor-parallel groups"),
        ("aabbbaab", {"tensor": 4},
         "2 of 2 tensor-parallel groups are on several hosts (rank 0 is on a, rank 2 of its group on b)"),
        ("aaabbabb", {"tensor": 2},
         "2 of 4 tensor-parallel groups are on several hosts (rank 2 is on a, rank 3 of its group on b)"),
        ("aabbaabb", {"tensor": 2, "context": 2},
         "4 of 4 context-parallel groups are on several hosts (rank 0 is on a, rank 2 "),
        ("abab", {"expert": 2}, "2 of 2 expert-parallel groups"),
    ],
)  # fmt: skip
def test_ranks_in_an_order_that_parts_them_are_named_with_the_order_to_give(hosts, layout, words):
    assert words in said(hosts, **layout)
    assert "--distribution=block" in said(hosts, **layout)
    assert said("".join(sorted(hosts)), **layout) is None


@pytest.mark.parametrize(
    "hosts, tensor, words",
    [
        ("ab", 2, "parallel.tensor=2 does not divide the one rank of host a"),
        ("aabb", 4, "parallel.tensor=4 does not divide the 2 ranks of host a"),
        ("aaaabbbb", 8, "parallel.tensor=8 does not divide the 4 ranks of host a"),
        ("aabbbccc", 2, "parallel.tensor=2 does not divide the 3 ranks of host b"),
    ],
)
def test_a_layout_that_no_order_can_place_is_told_from_a_bad_order(hosts, tensor, words):
    assert words in said(hosts, tensor=tensor) and "--distribution" not in said(hosts, tensor=tensor)


def test_hosts_of_one_name_are_told_apart():
    groups = {"tensor": {(0, 1)}}
    assert misplaced([("localhost", "one"), ("localhost", "other")], groups) is not None
    assert misplaced([("pod-0", "the same"), ("pod-1", "the same")], groups) is None
