import copy
import io
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpo_megatron.advantages import RewardHistory

VISITS = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0], [-1, 0, 1, 1]]
GOLDEN = {
    0: [
        [1.732051, -0.577350, -0.577350, -0.577350],
        [1.145497, 1.145497, -0.887298, -0.887298],
        [-0.192450] * 4,
        [0.283473] * 4,
        [0.661880, 0.661880, 0.661880, -1.146410],
        [-1.678382, -0.383915, 0.910553, 0.910553],
    ],
    1: [
        [1.5, -0.5, -0.5, -0.5],
        [0.996747, 0.996747, -0.771253, -0.771253],
        [-0.171499] * 4,
        [0.264553] * 4,
        [0.585164, 0.585164, 0.585164, -1.040656],
        [-1.470140, -0.337703, 0.794734, 0.794734],
    ],
}
GOLDEN_MEAN = [0.25, 0.375, 0.25, 0.4375, 0.5, 0.458333]
GOLDEN_SIGMA = [0.433013, 0.484123, 0.433013, 0.496078, 0.5, 0.575845]

reward = st.one_of(st.sampled_from([-1.0, 0.0, 1.0]), st.floats(-3, 3).map(lambda x: round(x, 3)))
visits_of_one_prompt = st.lists(st.lists(reward, min_size=1, max_size=6), min_size=1, max_size=8)


def observe(history, rewards, prompt_id="p"):
    return history.observe([prompt_id] * len(rewards), torch.tensor(rewards, dtype=torch.float64)).tolist()


def quiet_history(std_ddof=0):
    history = RewardHistory(std_ddof)
    history._warned = True  # the warning has its own test
    return history


@pytest.mark.parametrize("std_ddof", [0, 1])
def test_advantages_equal_the_golden_values(std_ddof):
    history = RewardHistory(std_ddof)
    for rewards, expected in zip(VISITS, GOLDEN[std_ddof], strict=True):
        assert observe(history, rewards) == pytest.approx(expected, abs=1e-6)


def test_statistics_equal_the_golden_values():
    history = RewardHistory()
    for i, rewards in enumerate(VISITS):
        observe(history, rewards)
        statistics = history.statistics("p")
        assert (statistics.visits, statistics.count) == (i + 1, 4 * (i + 1))
        assert statistics.mean == pytest.approx(GOLDEN_MEAN[i], abs=1e-6)
        assert statistics.std == pytest.approx(GOLDEN_SIGMA[i], abs=1e-6)


def test_the_advantage_of_a_solved_prompt_decays_as_the_golden_values_say():
    history = RewardHistory()
    first = [observe(history, rewards)[0] for rewards in [[1, 1, 0, 0]] + 7 * [[1, 1, 1, 1]]]
    assert first == pytest.approx([1, 0.288675, 0.149071, 0.094491, 0.066667, 0.050252, 0.039621, 0.032275], abs=1e-6)


def direct(visits, std_ddof=0):
    """SAS of the last visit from the definition, over everything seen, unequal group sizes weighted by their counts."""
    visits = [torch.tensor(rewards, dtype=torch.float64) for rewards in visits]
    new, everything, i = visits[-1], torch.cat(visits), len(visits)
    mean_tot = everything.mean()
    within = sum(len(rewards) * variance(rewards, std_ddof) for rewards in visits)
    between = sum(len(rewards) * (rewards.mean() - mean_tot) ** 2 for rewards in visits)
    sigma_tot = everything.std(correction=0) if std_ddof == 0 else ((within + between) / len(everything)).sqrt()
    a_new = (new - new.mean()) / variance(new, std_ddof).sqrt() if new.max() > new.min() else torch.zeros_like(new)
    a_tot = (new - mean_tot) / sigma_tot if sigma_tot > 1e-8 else torch.zeros_like(new)
    return (((i - 1) * a_new + a_tot) / i).tolist(), ((a_new + (i - 1) * a_tot) / i).tolist()


def variance(rewards, std_ddof):
    return rewards.var(correction=std_ddof) if rewards.max() > rewards.min() else torch.zeros((), dtype=torch.float64)


@given(visits_of_one_prompt, st.sampled_from([0, 1]))
@settings(max_examples=200)
def test_advantages_equal_direct_statistics_over_everything_seen_also_for_unequal_groups(visits, std_ddof):
    history = quiet_history(std_ddof)
    for i, rewards in enumerate(visits):
        got = observe(history, rewards)
        for value, sa_new, sa_tot in zip(got, *direct(visits[: i + 1], std_ddof), strict=True):
            # Where the two candidates tie up to rounding either is right.
            tie = math.isclose(abs(sa_new), abs(sa_tot), rel_tol=1e-9, abs_tol=1e-12)
            expected = (sa_new, sa_tot) if tie else (sa_new,) if abs(sa_new) < abs(sa_tot) else (sa_tot,)
            assert any(value == pytest.approx(candidate, rel=1e-8, abs=1e-10) for candidate in expected)


@given(st.lists(st.lists(reward, min_size=4, max_size=4), min_size=1, max_size=8), st.sampled_from([0, 1]))
@settings(max_examples=100)
def test_with_equal_groups_the_history_is_the_papers_recursion(visits, std_ddof):
    history = quiet_history(std_ddof)
    mean, var = 0.0, 0.0
    for i, rewards in enumerate(visits, start=1):
        observe(history, rewards)
        new = torch.tensor(rewards, dtype=torch.float64)
        mean_new, variance_new = new.mean().item(), new.var(correction=std_ddof).item()
        old = mean
        mean = ((i - 1) * old + mean_new) / i
        var = ((i - 1) * var + variance_new + (i - 1) / i * (old - mean_new) ** 2) / i
        assert history.statistics("p").mean == pytest.approx(mean, abs=1e-12)
        assert history.statistics("p").std == pytest.approx(math.sqrt(var), abs=1e-7)


def test_a_tie_takes_the_total():
    history = RewardHistory()
    observe(history, [4, 6])
    observe(history, [4, 4, 6, 6])
    # i = 3, all numbers exact: new has mean 1 and sigma 1, total has mean 4 and sigma 2. For the reward 2 that is
    # A_new = 1, A_tot = -1, so SA_new = 1/3 and SA_tot = -1/3.
    assert observe(history, [0, 2])[1] == -1 / 3


def test_the_first_visit_is_the_group_z_score():
    rewards = torch.tensor([0.5, -1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    expected = (rewards - rewards.mean()) / rewards.std(correction=0)
    assert observe(RewardHistory(), rewards.tolist()) == pytest.approx(expected.tolist())


def test_equal_rewards_after_a_mixed_history_give_the_total_advantage_over_i():
    history = RewardHistory()
    observe(history, [1, 0, 0, 0])
    observe(history, [1, 1, 0, 0])
    mean = 7 / 12  # of [1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1]
    assert observe(history, [1, 1, 1, 1]) == pytest.approx([(1 - mean) / math.sqrt(mean * (1 - mean)) / 3] * 4)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1 / 3])
@pytest.mark.parametrize("std_ddof", [0, 1])
def test_equal_rewards_in_all_visits_give_exactly_zero(value, std_ddof):
    history = RewardHistory(std_ddof)
    for size in (3, 7, 4, 11):
        assert observe(history, [value] * size) == [0.0] * size
    assert history.statistics("p").std == 0.0


def test_rounding_noise_of_shaped_rewards_does_not_become_an_advantage():
    history = RewardHistory()
    assert max(map(abs, observe(history, [0.3, 0.1 + 0.2, 0.3, 0.3]))) == 0.0
    assert max(map(abs, observe(history, [0.1 + 0.2] * 4))) == 0.0


@pytest.mark.parametrize("scale", [1.0, 7.0, 1e6])
def test_rounding_noise_beside_a_real_history_is_no_visit_with_preferences(scale):
    # A_new = 0, so that A = A_tot / i, the same for all.
    noisy, exact = RewardHistory(), RewardHistory()
    for history, third in ((noisy, 0.1 + 0.2), (exact, 0.3)):
        observe(history, [0.0, scale])
        advantages = observe(history, [0.3 * scale, third * scale, 0.3 * scale])
        assert advantages == pytest.approx([advantages[0]] * 3, rel=1e-12)
    assert noisy.statistics("p").mean == pytest.approx(exact.statistics("p").mean, rel=1e-12)


def test_a_history_that_varies_by_rounding_of_large_rewards_is_constant():
    history = RewardHistory()
    for _ in range(3):
        assert observe(history, [1e6 / 3, 1e6 / 3 + 1e-9, 1e6 / 3]) == [0.0] * 3


def test_a_small_but_real_difference_of_rewards_is_not_noise():
    history = RewardHistory()
    assert observe(history, [0.0, 1e-7]) == pytest.approx([-1.0, 1.0])
    assert observe(history, [0.0, 1e-7]) == pytest.approx([-1.0, 1.0])


@pytest.mark.parametrize("unit", [0.1, 0.2, 0.7, 1 / 3, 1.0, 10.0])
def test_a_tie_of_opposite_sign_takes_the_total_whatever_the_rounding(unit):
    # SA_new = -1/3 and SA_tot = +1/3 in exact arithmetic.
    history = RewardHistory()
    for first, second in ((0, 0), (1, 1)):
        observe(history, [first * unit, second * unit])
    assert observe(history, [3 * unit, 4 * unit])[0] == pytest.approx(1 / 3, rel=1e-9)


def test_a_visit_taken_back_leaves_the_history_as_it_was():
    history, never = RewardHistory(), RewardHistory()
    for one in (history, never):
        one.observe(["a", "a", "b", "b"], torch.tensor([0.0, 1, 1, 1]))
    history.observe(["n", "a", "a", "b", "m", "b"], torch.tensor([1.0, 0, 0, 1, 0, 0]))
    history.take_back(["a", "n"])
    never.observe(["b", "m", "b"], torch.tensor([1.0, 0, 0]))
    assert (history.visits("a"), history.visits("b"), history.visits("n"), history.visits("m")) == (1, 2, 0, 1)
    assert history.statistics("b") == never.statistics("b") and history.statistics("a") == never.statistics("a")
    # The same numbers from here on, and a state that loads.
    ids, rewards = ["m", "n", "n", "a", "b", "m"], torch.tensor([1.0, 0, 1, 1, 0, 0])
    assert history.observe(ids, rewards).tolist() == never.observe(ids, rewards).tolist()
    RewardHistory().load_state_dict(history.state_dict())
    with pytest.raises(KeyError, match="last visit"):
        never.take_back(["b", "unknown"])
    assert never.visits("b") == 3
    never.take_back(["m", "m"])
    with pytest.raises(KeyError, match="'m'"):
        never.take_back(["m"])


def test_visits_are_counted_per_prompt_and_not_per_step():
    history = RewardHistory()
    observe(history, [1, 0], "a")
    observe(history, [1, 0], "a")
    observe(history, [1, 0], "b")
    assert (history.visits("a"), history.visits("b"), history.visits("c"), len(history)) == (2, 1, 0, 2)
    with pytest.raises(KeyError, match="never observed"):
        history.statistics("c")


def test_prompts_interleaved_in_one_batch_are_independent():
    together, apart = RewardHistory(), RewardHistory()
    for a, b in (([1, 0, 0], [1, 1, 0]), ([1, 1, 1], [0, 1, 0])):
        mixed = [reward for pair in zip(a, b, strict=True) for reward in pair]
        got = together.observe(["a", "b"] * 3, torch.tensor(mixed))
        assert got.tolist()[0::2] == observe(apart, a, "a") and got.tolist()[1::2] == observe(apart, b, "b")


def test_the_same_id_twice_in_a_batch_is_one_visit():
    history, whole = RewardHistory(), RewardHistory()
    got = history.observe(["a", "a", "b", "b", "a", "a"], torch.tensor([1.0, 0, 1, 0, 0, 0]))
    assert got[[0, 1, 4, 5]].tolist() == observe(whole, [1, 0, 0, 0], "a")
    assert history.visits("a") == 1


def test_the_result_is_float64_of_the_length_of_the_batch_for_any_reward_dtype():
    for rewards in (torch.tensor([1, 0]), torch.tensor([1.0, 0.0]).half(), torch.tensor([True, False])):
        got = RewardHistory().observe(["a", "a"], rewards)
        assert got.dtype == torch.float64 and got.tolist() == [1.0, -1.0]
    assert RewardHistory().observe([], torch.tensor([])).shape == (0,)


def test_a_single_response_on_a_first_visit_has_advantage_zero_and_warns_once():
    history = RewardHistory()
    with pytest.warns(UserWarning, match="single response"):
        assert observe(history, [1.0], "a") == [0.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert observe(history, [1.0], "b") == [0.0]
        # On a later visit there is something to compare with: mean 0.5, sigma 0.5, A_tot = -1, i = 2.
        assert observe(history, [0.0], "a") == pytest.approx([-0.5])


def test_a_single_response_on_a_later_visit_does_not_warn():
    history = RewardHistory()
    observe(history, [1.0, 0.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        observe(history, [1.0])


@pytest.mark.parametrize(
    ("ids", "rewards", "error", "message"),
    [
        (["a", None], [1.0, 0.0], ValueError, "no prompt id"),
        (["a", ""], [1.0, 0.0], ValueError, "no prompt id"),
        (["a", 7], [1.0, 0.0], TypeError, "give a str"),
        (["a", b"b"], [1.0, 0.0], TypeError, "give a str"),
        (["a", "bad"], [1.0, math.nan], ValueError, "'bad'"),
        (["a", "bad"], [1.0, math.inf], ValueError, "'bad'"),
        (["a", "bad"], [1.0, -1e300], ValueError, "'bad'"),
        (["a"], [1.0, 0.0], ValueError, "1 prompt ids"),
        (["a", "a"], [[1.0, 0.0]], ValueError, "2 prompt ids"),
        ("ab", [1.0, 0.0], TypeError, "list"),
    ],
)
def test_impossible_input_is_refused_and_changes_nothing(ids, rewards, error, message):
    history = RewardHistory()
    observe(history, [1, 0, 0], "a")
    before = history.state_dict()
    with pytest.raises(error, match=message):
        history.observe(ids, torch.tensor(rewards, dtype=torch.float64))
    after = history.state_dict()
    assert before["prompt_ids"] == after["prompt_ids"] == ["a"]
    assert all(torch.equal(before[name], after[name]) for name in ("visits", "counts", "means", "m2"))


def test_rewards_that_are_no_tensor_are_refused():
    with pytest.raises(TypeError, match="tensor"):
        RewardHistory().observe(["a"], [1.0])


def test_a_warning_turned_into_an_error_leaves_the_history_unchanged():
    history = RewardHistory()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            observe(history, [1.0], "a")
    assert len(history) == 0


@pytest.mark.parametrize("std_ddof", [2, -1, True, None])
def test_an_impossible_ddof_is_refused(std_ddof):
    with pytest.raises(ValueError, match="std_ddof"):
        RewardHistory(std_ddof)


def history_with_odd_numbers(std_ddof=0):
    history = quiet_history(std_ddof)
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        ids = [f"prompt/{i}-\u00e4\u4e2d" for i in range(10) for _ in range(3)]
        history.observe(ids, torch.rand(30, generator=generator, dtype=torch.float64) / 3)
    return history


def test_a_restored_history_goes_on_bit_for_bit():
    history = history_with_odd_numbers()
    buffer = io.BytesIO()
    torch.save(history.state_dict(), buffer)
    buffer.seek(0)
    restored = RewardHistory()
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    ids, rewards = history.state_dict()["prompt_ids"] * 2, torch.rand(20, dtype=torch.float64)
    assert torch.equal(history.observe(ids, rewards), restored.observe(ids, rewards))
    a, b = history.state_dict(), restored.state_dict()
    assert a["prompt_ids"] == b["prompt_ids"]
    assert all(torch.equal(a[name], b[name]) for name in ("visits", "counts", "means", "m2"))


def test_a_saved_state_does_not_change_with_the_history():
    history = RewardHistory()
    observe(history, [1, 0])
    saved = history.state_dict()
    kept = copy.deepcopy(saved)
    observe(history, [1, 1])
    observe(history, [1, 1], "new")
    assert saved["prompt_ids"] == kept["prompt_ids"] and torch.equal(saved["counts"], kept["counts"])


def test_an_empty_history_can_be_saved_and_restored():
    history = history_with_odd_numbers()
    history.load_state_dict(RewardHistory().state_dict())
    assert len(history) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version"),
        ({"std_ddof": 1}, "std_ddof"),
        ({"prompt_ids": ["a", "a"]}, "distinct"),
        ({"prompt_ids": ["a", ""]}, "distinct"),
        ({"prompt_ids": ["a"]}, "visits"),
        ({"visits": torch.tensor([1, 1], dtype=torch.int32)}, "visits"),
        ({"visits": torch.tensor([1, 0])}, "'b'"),
        ({"counts": torch.tensor([2, 0])}, "'b'"),
        ({"means": torch.tensor([0.0, math.nan], dtype=torch.float64)}, "'b'"),
        ({"means": torch.tensor([0.0, 0.0])}, "means"),
        ({"m2": torch.tensor([0.0, -1.0], dtype=torch.float64)}, "'b'"),
        ({"m2": [0.0, 1.0]}, "m2"),
        ({"extra": 1}, "keys"),
    ],
)
def test_a_state_that_cannot_be_is_refused_and_changes_nothing(changes, message):
    source = RewardHistory()
    source.observe(["a", "a", "b", "b"], torch.tensor([1.0, 0.0, 1.0, 1.0]))
    history = RewardHistory()
    observe(history, [1, 0], "kept")
    with pytest.raises(ValueError, match=message):
        history.load_state_dict({**source.state_dict(), **changes})
    assert history.state_dict()["prompt_ids"] == ["kept"]


def test_a_state_with_a_missing_key_is_refused():
    state = RewardHistory().state_dict()
    del state["m2"]
    with pytest.raises(ValueError, match="keys"):
        RewardHistory().load_state_dict(state)
    with pytest.raises(ValueError, match="version"):
        RewardHistory().load_state_dict([])
