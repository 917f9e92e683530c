import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpo_megatron.objectives import Objective, aggregation_weights, get_preset, policy_loss

LENGTHS = [3, 1, 7, 4]
PROMPTS = [0, 0, 1, 1]


def batch(seed=0, spread=2e-3):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    old = -torch.rand(len(ids), generator=generator, dtype=torch.float64) - 0.5
    new = old + spread * torch.randn(len(ids), generator=generator, dtype=torch.float64)
    advantages = torch.tensor([1.0, -2.0, 0.5, -1.0], dtype=torch.float64)[ids]
    return ids, old, new, advantages


def direct_gspo(new, old, ids, advantages, eps_low, eps_high):
    """GSPO written per response, differentiated by autograd through s_j itself."""
    total = torch.zeros((), dtype=torch.float64)
    for j in range(4):
        mine = ids == j
        s = torch.exp((new[mine] - old[mine]).mean())
        advantage = advantages[mine][0]
        surrogate = torch.minimum(s * advantage, s.clamp(1 - eps_low, 1 + eps_high) * advantage)
        total = total - surrogate / (2 * PROMPTS.count(PROMPTS[j]))
    return total


@given(st.integers(0, 10_000), st.sampled_from([1e-4, 2e-3, 0.3]))
@settings(max_examples=60)
def test_value_and_gradient_are_those_of_gspo(seed, spread):
    ids, old, new, advantages = batch(seed, spread)
    weights = aggregation_weights("slm", LENGTHS, PROMPTS)[ids]
    mine, theirs = new.clone().requires_grad_(), new.clone().requires_grad_()
    result = policy_loss(
        mine, old, advantages, "gspo", response_ids=ids, response_lengths=torch.tensor(LENGTHS), num_responses=4
    )
    loss = (weights * result.loss).sum()
    expected = direct_gspo(theirs, old, ids, advantages, 3e-4, 4e-4)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(mine.grad, theirs.grad, rtol=1e-10, atol=1e-14)


def test_the_ratio_and_the_clip_are_one_per_response():
    ids, old, new, advantages = batch()
    result = policy_loss(new, old, advantages, "gspo", response_ids=ids, response_lengths=torch.tensor(LENGTHS))
    for j in range(4):
        mine = ids == j
        expected = math.exp((new[mine] - old[mine]).mean().item())
        assert result.ratio[mine].tolist() == pytest.approx([expected] * LENGTHS[j])
        assert result.gradient_removed[mine].unique().numel() == 1
    assert result.gradient_removed.any() and not result.gradient_removed.all()


def test_tokens_of_a_response_cut_over_two_ranks_give_the_result_of_one_rank():
    ids, old, new, advantages = batch()
    lengths = torch.tensor(LENGTHS)
    whole = policy_loss(new, old, advantages, "gspo", response_ids=ids, response_lengths=lengths)
    parts = [torch.arange(len(ids)) % 2 == 0, torch.arange(len(ids)) % 2 == 1]
    sums = []
    for part in parts:  # first see what each rank would send ...
        policy_loss(
            new[part],
            old[part],
            advantages[part],
            "gspo",
            response_ids=ids[part],
            response_lengths=lengths,
            all_reduce=lambda local: (sums.append(local.clone()), local)[1],
        )
    for part in parts:  # ... then give each rank the sum
        got = policy_loss(
            new[part],
            old[part],
            advantages[part],
            "gspo",
            response_ids=ids[part],
            response_lengths=lengths,
            all_reduce=lambda local: sums[0] + sums[1],
        )
        assert torch.allclose(got.ratio, whole.ratio[part], rtol=1e-14)
        assert torch.allclose(got.loss, whole.loss[part], rtol=1e-14)


def test_a_negative_response_id_is_a_token_outside_every_response():
    ids, old, new, advantages = batch()
    whole = policy_loss(new, old, advantages, "gspo", response_ids=ids, response_lengths=torch.tensor(LENGTHS))
    outside = torch.tensor([math.nan], dtype=torch.float64)
    padded = policy_loss(
        torch.cat([outside, new]),
        torch.cat([outside, old]),
        torch.cat([torch.ones(1, dtype=torch.float64), advantages]),
        "gspo",
        response_ids=torch.cat([torch.tensor([-1]), ids]),
        response_lengths=torch.tensor(LENGTHS),
    )
    assert padded.loss[0].item() == 0 and not padded.gradient_removed[0]
    assert torch.equal(padded.loss[1:], whole.loss)


def test_responses_without_local_tokens_are_allowed():
    # With context parallelism a rank may hold no token of a response.
    zeros = torch.zeros(2)
    result = policy_loss(
        zeros, zeros, torch.ones(2), "gspo", response_ids=torch.tensor([2, 2]), response_lengths=torch.tensor([5, 0, 2])
    )
    assert result.ratio.tolist() == [1.0, 1.0]


def test_sequence_cispo_weights_the_tokens_with_the_clipped_ratio_of_their_response():
    ids, old, new, advantages = batch(spread=0.3)
    objective = replace(get_preset("gspo"), out_of_bound="cispo")
    leaf = new.clone().requires_grad_()
    result = policy_loss(leaf, old, advantages, objective, response_ids=ids, response_lengths=torch.tensor(LENGTHS))
    result.loss.sum().backward()
    assert torch.allclose(leaf.grad, -advantages * result.ratio.clamp(1 - 3e-4, 1 + 4e-4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"response_ids": None}, "response_ids"),
        ({"response_lengths": None}, "response_lengths"),
        ({"response_ids": torch.zeros(2, dtype=torch.int64)}, "response_ids"),
        ({"response_ids": torch.zeros(3, dtype=torch.int32)}, "int64"),
        ({"response_ids": torch.tensor([0, 0, 7])}, "out of range"),
        ({"response_lengths": torch.tensor([3.0])}, "whole numbers"),
        ({"response_lengths": torch.tensor([0])}, "full lengths"),
        ({"num_responses": 2}, "num_responses"),
        ({"all_reduce": lambda sums: None}, "all_reduce"),
    ],
)
def test_missing_or_inconsistent_response_arguments_are_refused(changes, message):
    arguments = {"response_ids": torch.zeros(3, dtype=torch.int64), "response_lengths": torch.tensor([3]), **changes}
    with pytest.raises(ValueError, match=message):
        policy_loss(torch.zeros(3), torch.zeros(3), torch.ones(3), "gspo", **arguments)


def test_batched_logprobs_are_refused_at_sequence_level():
    objective = Objective(bounds="fixed", ratio_level="sequence")
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="flat"):
        policy_loss(
            torch.zeros(1, 3),
            torch.zeros(1, 3),
            torch.ones(1, 3),
            objective,
            response_ids=ids,
            response_lengths=torch.tensor([3]),
        )
