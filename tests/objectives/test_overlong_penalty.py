import pytest
import torch

from dcpo_megatron.objectives import soft_overlong_penalty


def test_the_penalty_falls_linearly_over_the_buffer_and_stays_at_minus_one():
    lengths = torch.tensor([0, 2560, 2561, 2816, 3072, 3073, 9999])
    expected = [0, 0, -1 / 512, -0.5, -1, -1, -1]
    penalty = soft_overlong_penalty(lengths, 3072, 512)
    assert penalty.tolist() == expected and penalty.dtype == torch.float64


def test_one_length_gives_one_number():
    assert soft_overlong_penalty(2816, 3072, 512).item() == -0.5


def test_a_buffer_of_zero_means_no_penalty():
    assert soft_overlong_penalty(torch.tensor([1, 3072, 4000]), 3072, 0).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("limit", "buffer"), [(0, 0), (100, -1), (100, 101)])
def test_impossible_limits_are_refused(limit, buffer):
    with pytest.raises(ValueError, match="buffer"):
        soft_overlong_penalty(torch.tensor([1]), limit, buffer)
