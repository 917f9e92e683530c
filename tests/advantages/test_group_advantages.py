import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpo_megatron.advantages import RewardHistory, group_advantages

groups = st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.25, 1.0]), min_size=2, max_size=6), min_size=1, max_size=4)


def definition(rewards, mode, std_ddof):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    if rewards.max() == rewards.min():
        return [0.0] * len(rewards)
    if mode == "group":
        return ((rewards - rewards.mean()) / rewards.std(correction=std_ddof)).tolist()
    if mode == "mean":
        return (rewards - rewards.mean()).tolist()
    return [(rewards[j] - torch.cat([rewards[:j], rewards[j + 1 :]]).mean()).item() for j in range(len(rewards))]


@given(groups, st.sampled_from(["group", "mean", "leave_one_out"]), st.sampled_from([0, 1]), st.randoms())
@settings(max_examples=200)
def test_advantages_equal_their_definitions_in_any_order(batch, mode, std_ddof, random):
    rows = [
        (str(g), reward, expected)
        for g, rewards in enumerate(batch)
        for reward, expected in zip(rewards, definition(rewards, mode, std_ddof), strict=True)
    ]
    random.shuffle(rows)
    ids, rewards, expected = zip(*rows, strict=True)
    got = group_advantages(list(ids), torch.tensor(rewards), mode, std_ddof)
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx(list(expected), rel=1e-12, abs=1e-12)


@given(groups, st.sampled_from([0, 1]))
@settings(max_examples=50)
def test_the_group_z_score_is_the_first_visit_of_a_history(batch, std_ddof):
    ids = [str(g) for g, rewards in enumerate(batch) for _ in rewards]
    rewards = torch.tensor([reward for rewards in batch for reward in rewards])
    first_visit = RewardHistory(std_ddof).observe(ids, rewards)
    assert torch.allclose(group_advantages(ids, rewards, "group", std_ddof), first_visit, rtol=1e-14)


@pytest.mark.parametrize("mode", ["group", "mean", "leave_one_out"])
def test_a_constant_group_has_exactly_zero_advantages(mode):
    # A mean of three times 0.1 by naive summation is not 0.1.
    rewards = torch.tensor([0.1] * 3 + [0.7] * 7, dtype=torch.float64)
    assert group_advantages(["a"] * 3 + ["b"] * 7, rewards, mode).tolist() == [0.0] * 10


@pytest.mark.parametrize("mode", ["group", "mean", "leave_one_out"])
def test_a_group_of_one_has_advantage_zero_with_a_warning(mode):
    with pytest.warns(UserWarning, match="single response"):
        assert group_advantages(["a"], torch.tensor([5.0]), mode).tolist() == [0.0]


@pytest.mark.parametrize("mode", ["group", "mean", "leave_one_out"])
@pytest.mark.parametrize("std_ddof", [0, 1])
def test_rounding_noise_is_no_preference(mode, std_ddof):
    noisy = torch.tensor([0.3, 0.1 + 0.2, 0.3, 0.3, 1e6 / 3, 1e6 / 3 + 1e-9], dtype=torch.float64)
    assert group_advantages(["a"] * 4 + ["b"] * 2, noisy, mode, std_ddof).tolist() == [0.0] * 6


def test_no_epsilon_enters_the_division():
    rewards = torch.tensor([0.0, 1e-7], dtype=torch.float64)
    assert group_advantages(["a", "a"], rewards, "group").tolist() == pytest.approx([-1.0, 1.0], rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], torch.ones(1), "sas"), "RewardHistory"),
        ((["a"], torch.ones(1), "z"), "mode"),
        ((["a"], torch.ones(1), "group", 2), "std_ddof"),
        (([None], torch.ones(1), "group"), "no prompt id"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(*arguments)
