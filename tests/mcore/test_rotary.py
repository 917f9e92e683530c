"""Rotary angles by position: the same numbers as Megatron-Core's own, in a number of operators that the sequences do
not change."""

import pytest
import torch

from dcpo_megatron.verification.ranks import RankPool
from tests.other_megatron import other_megatron


@pytest.fixture(scope="module", params=["installed", "other"])
def measured(request):
    with RankPool(2, python_path=[str(other_megatron())] if request.param == "other" else []) as pool:
        yield pool.run("tests.mcore.rotary_jobs:count_and_compare", 2)


def test_a_layers_operators_do_not_grow_with_the_sequences_of_its_row(measured):
    for counts, _ in measured:
        assert counts[2] == counts[16], counts


def test_the_whole_row_gets_the_bits_that_each_sequence_gets_from_megatron_core(measured):
    for _, pairs in measured:
        for ours, megatrons in pairs:
            assert torch.equal(ours, megatrons)
