import pytest
import torch

from dcpo_megatron.advantages import keep_mixed_groups


def test_exactly_the_prompts_with_right_and_wrong_answers_are_kept():
    ids = ["all", "none", "some", "some", "all", "none", "one", "some"]
    correct = torch.tensor([True, False, True, False, True, False, True, False])
    assert keep_mixed_groups(ids, correct).tolist() == [False, False, True, True, False, False, False, True]


def test_an_empty_batch_keeps_nothing():
    kept = keep_mixed_groups([], torch.zeros(0, dtype=torch.bool))
    assert kept.dtype == torch.bool and kept.shape == (0,)


def test_rewards_in_the_place_of_correctness_are_refused():
    with pytest.raises(TypeError, match="bool"):
        keep_mixed_groups(["a", "a"], torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match="prompt ids"):
        keep_mixed_groups(["a"], torch.tensor([True, False]))
