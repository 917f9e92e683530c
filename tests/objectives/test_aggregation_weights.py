import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpo_megatron.objectives import aggregation_weights, policy_loss

responses = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5)), min_size=1, max_size=24)


def spread(per_response, lengths):
    return torch.repeat_interleave(per_response, torch.tensor(lengths))


@pytest.mark.parametrize(("aggregation", "expected"), [("otm", -1.5), ("slm", -0.75), ("tlm", -0.625)])
def test_the_papers_example_of_two_responses(aggregation, expected):
    lengths = [500, 1500]
    advantages = spread(torch.tensor([1.0, 0.5], dtype=torch.float64), lengths)
    logprobs = torch.full((2000,), -1.0, dtype=torch.float64)
    weights = spread(aggregation_weights(aggregation, lengths, [0, 0]), lengths)
    loss = (weights * policy_loss(logprobs, logprobs, advantages, "dcpo-paper").loss).sum()
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_dr_divides_by_responses_times_the_longest_possible_response():
    weights = aggregation_weights("dr", [500, 1500], [0, 0], max_response_tokens=3072)
    assert weights.tolist() == [1 / (2 * 3072)] * 2


@given(responses)
@settings(max_examples=200)
def test_weights_equal_their_definitions(batch):
    lengths, prompts = (list(column) for column in zip(*batch, strict=True))
    number = len(set(prompts))
    expected = {
        "otm": [1 / (number * n) if n else 0 for n in lengths],
        "slm": [1 / (number * prompts.count(p) * n) if n else 0 for n, p in batch],
        "tlm": [1 / sum(lengths) if n else 0 for n in lengths],
        "dr": [1 / (len(lengths) * 40) if n else 0 for n in lengths],
    }
    for aggregation, values in expected.items():
        weights = aggregation_weights(aggregation, torch.tensor(lengths), prompts, max_response_tokens=40)
        assert weights.dtype == torch.float64
        assert weights.tolist() == pytest.approx(values, rel=1e-14)


@given(st.lists(st.integers(1, 40), min_size=4, max_size=4))
@settings(max_examples=50)
def test_with_equal_groups_otm_is_the_group_size_times_the_sequence_mean(lengths):
    prompts = [3, 9, 3, 9]
    otm, slm = (aggregation_weights(name, lengths, prompts) for name in ("otm", "slm"))
    assert torch.allclose(otm, 2 * slm, rtol=1e-15)


@given(st.data())
@settings(max_examples=60)
def test_the_otm_loss_does_not_depend_on_how_the_responses_are_cut_into_micro_batches(data):
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=2, max_size=10))
    prompts = data.draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    total = sum(lengths)
    old = -torch.rand(total, generator=generator, dtype=torch.float64) * 5
    new = old + 0.3 * torch.randn(total, generator=generator, dtype=torch.float64)
    advantages = torch.randn(total, generator=generator, dtype=torch.float64)
    weights = spread(aggregation_weights("otm", lengths, prompts), lengths)

    def loss_over(tokens):
        return (weights[tokens] * policy_loss(new[tokens], old[tokens], advantages[tokens], "dcpo-paper").loss).sum()

    # by the definition: token mean in a response, sum in a prompt, mean over prompts
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    token_losses = policy_loss(new, old, advantages, "dcpo-paper").loss
    means = [token_losses[a:b].mean().item() for a, b in itertools.pairwise(starts)]
    expected = sum(means) / len(set(prompts))
    response_of = spread(torch.arange(len(lengths)), lengths)
    cuts = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=len(lengths), max_size=len(lengths))))
    pieces = [loss_over(cuts[response_of] == piece).item() for piece in range(3)]
    assert sum(pieces) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_an_empty_response_has_weight_zero_but_its_prompt_counts():
    assert aggregation_weights("otm", [0, 2], [0, 1]).tolist() == [0.0, 0.25]
    assert aggregation_weights("slm", [0, 2], [1, 1]).tolist() == [0.0, 0.25]
    assert aggregation_weights("tlm", [0, 0], [1, 1]).tolist() == [0.0, 0.0]


def test_an_empty_minibatch_has_no_weights():
    assert aggregation_weights("otm", [], []).shape == (0,)


def test_the_weight_of_a_long_response_in_a_large_minibatch_is_not_rounded():
    weights = aggregation_weights("tlm", [2**24 + 1, 2**24 + 1], [0, 1])
    assert weights[0].item() == 1 / (2**25 + 2)  # float32 cannot count to 2^24 + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mean", [1], [0]), "aggregation"),
        (("otm", [1, 2], [0]), "prompt_index"),
        (("otm", [-1], [0]), "-1"),
        (("otm", [1.5], [0]), "response_lengths"),
        (("otm", [1], [0.5]), "prompt_index"),
        (("dr", [1], [0]), "max_response_tokens"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        aggregation_weights(*arguments)
