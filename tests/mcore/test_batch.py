"""What a micro-batch's tensors say of each response token, packed, padded and split over context-parallel ranks."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpo_megatron.mcore.attention import zigzag_slices
from dcpo_megatron.mcore.batch import TrainingSample, make_micro_batch

CPU = torch.device("cpu")
PAD = 99


def sequence(number, prompt, response, **fields):
    """Token ids name their place: 1000 * number + place."""
    ids = [1000 * number + place for place in range(prompt + response)]
    return TrainingSample(number, ids[:prompt], ids[prompt:], advantage=number / 4, weight=number / 8, **fields)


def with_logprobs(number, prompt, response):
    per_token = torch.tensor([-(number + t / 16) for t in range(response)])
    return sequence(
        number,
        prompt,
        response,
        old_logprobs=per_token,
        rollout_logprobs=per_token - 0.5,
        reference_logprobs=per_token.double() - 0.25,
    )


def make(sequences, **settings_):
    return make_micro_batch(sequences, CPU, pad_id=PAD, **settings_)


def test_a_packed_row_lays_sequences_end_to_end_with_positions_from_zero():
    batch = make([sequence(3, 2, 3), sequence(7, 1, 2)])
    assert batch.input_ids.tolist() == [[3000, 3001, 3002, 3003, 3004, 7000, 7001, 7002]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch.positions.tolist() == [1, 2, 3, 5, 6]
    assert batch.targets.tolist() == [3002, 3003, 3004, 7001, 7002]
    assert batch.response.tolist() == [0, 0, 0, 1, 1]
    assert batch.token.tolist() == [0, 1, 2, 0, 1]
    assert batch.numbers == [3, 7]
    assert batch.response_lengths.tolist() == [3, 2]
    assert batch.advantages.tolist() == [0.75] * 3 + [1.75] * 2
    assert batch.weights.tolist() == [0.375] * 3 + [0.875] * 2
    assert batch.packed.plan.lengths == [5, 3]
    assert batch.old_logprobs is None


def test_padded_rows_are_filled_on_the_right_and_hold_one_sequence_each():
    batch = make([sequence(3, 2, 3), sequence(7, 1, 2)], packed=False)
    assert batch.input_ids.tolist() == [[3000, 3001, 3002, 3003, 3004], [7000, 7001, 7002, PAD, PAD]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert batch.positions.tolist() == [1, 2, 3, 5, 6]
    assert batch.targets.tolist() == [3002, 3003, 3004, 7001, 7002]
    assert batch.packed is None


def test_alignment_pads_each_packed_sequence_and_each_row():
    sequences = [sequence(3, 2, 3), sequence(7, 1, 2)]
    packed = make(sequences, align=4)
    assert packed.packed.plan.lengths == [8, 4]
    assert packed.input_ids.tolist() == [[3000, 3001, 3002, 3003, 3004, PAD, PAD, PAD, 7000, 7001, 7002, PAD]]
    assert packed.positions.tolist() == [1, 2, 3, 8, 9]
    assert make(sequences, align=4, packed=False).input_ids.shape == (2, 8)


def test_a_rows_alignment_pads_the_last_packed_sequence_alone():
    sequences = [sequence(3, 2, 3), sequence(7, 1, 2)]
    packed = make(sequences, align=2, row_align=4)
    assert packed.packed.plan.lengths == [6, 6]
    assert packed.input_ids.tolist() == [[3000, 3001, 3002, 3003, 3004, PAD, 7000, 7001, 7002, PAD, PAD, PAD]]
    assert packed.positions.tolist() == [1, 2, 3, 6, 7]
    assert make(sequences, row_align=8).packed.plan.lengths == [5, 3]
    assert make(sequences, align=2, row_align=4, packed=False).input_ids.shape == (2, 8)
    assert make([], align=2, row_align=4).input_ids.shape == (1, 4)


def test_logprobs_lie_beside_the_token_they_are_of():
    batch = make([with_logprobs(1, 2, 3), with_logprobs(2, 4, 1)], align=4)
    assert batch.old_logprobs.tolist() == [-1.0, -1.0625, -1.125, -2.0]
    assert batch.rollout_logprobs.tolist() == [-1.5, -1.5625, -1.625, -2.5]
    assert batch.reference_logprobs.tolist() == [-1.25, -1.3125, -1.375, -2.25]
    assert batch.reference_logprobs.dtype == torch.float32


def test_logprobs_that_one_sequence_lacks_are_none_for_all():
    batch = make([dataclasses.replace(with_logprobs(1, 2, 3), old_logprobs=None), sequence(2, 4, 1)])
    assert batch.old_logprobs is None and batch.rollout_logprobs is None and batch.reference_logprobs is None


def test_a_response_of_one_token_is_predicted_by_the_prompts_last_token():
    batch = make([with_logprobs(1, 3, 1)])
    assert batch.positions.tolist() == [2]
    assert batch.targets.tolist() == [1003]
    assert batch.token.tolist() == [0]
    assert batch.old_logprobs.tolist() == [-1.0]


def test_a_response_without_tokens_has_no_predicting_position():
    batch = make([with_logprobs(1, 3, 0), with_logprobs(2, 1, 1)])
    assert batch.positions.tolist() == [3]
    assert batch.response.tolist() == [1]
    assert batch.response_lengths.tolist() == [0, 1]
    assert batch.old_logprobs.tolist() == [-2.0]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("align", "context_size", "local"), [(1, 1, 1), (8, 1, 8), (8, 2, 4)])
def test_an_empty_list_gives_padding_alone(packed, align, context_size, local):
    batch = make([], packed=packed, align=align, context_size=context_size)
    assert batch.input_ids.tolist() == [[PAD] * local]
    assert batch.numbers == [] and batch.response_lengths.tolist() == []
    for name in ("positions", "targets", "response", "token", "advantages", "weights", "old_logprobs",
                 "rollout_logprobs", "reference_logprobs"):  # fmt: skip
        assert getattr(batch, name).tolist() == [], name
    assert batch.positions.dtype == batch.targets.dtype == torch.long
    assert batch.weights.dtype == batch.old_logprobs.dtype == torch.float32


@pytest.mark.parametrize("packed", [True, False])
def test_an_empty_prompt_is_refused_by_the_responses_number(packed):
    with pytest.raises(ValueError, match="response 7 has an empty prompt"):
        make([sequence(3, 1, 1), sequence(7, 0, 4)], packed=packed)


def test_a_context_parallel_rank_holds_its_zigzag_part():
    # 6 tokens, padded to 8: four chunks of two; rank 0 holds the first and the last, rank 1 the two between.
    ranks = [make([with_logprobs(1, 2, 4)], align=4, context_size=2, context_rank=rank) for rank in (0, 1)]
    assert [b.input_ids.tolist() for b in ranks] == [[[1000, 1001, PAD, PAD]], [[1002, 1003, 1004, 1005]]]
    assert [b.position_ids.tolist() for b in ranks] == [[[0, 1, 6, 7]], [[2, 3, 4, 5]]]
    assert [b.positions.tolist() for b in ranks] == [[1], [0, 1, 2]]
    # Rank 0 predicts the first response token, which stands on rank 1.
    assert [b.targets.tolist() for b in ranks] == [[1002], [1003, 1004, 1005]]
    assert [b.token.tolist() for b in ranks] == [[0], [1, 2, 3]]
    assert [b.old_logprobs.tolist() for b in ranks] == [[-1.0], [-1.0625, -1.125, -1.1875]]
    assert [b.response_lengths.tolist() for b in ranks] == [[4], [4]]  # of the full response
    assert [b.packed.plan.lengths for b in ranks] == [[8], [8]]


shapes = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=5)


@settings(deadline=None, database=None)
@given(shapes, st.booleans(), st.sampled_from([1, 2, 4]), st.sampled_from([1, 3]))
def test_all_context_ranks_together_predict_every_response_token_once_from_the_token_before_it(
    lengths, packed, context_size, factor
):
    sequences = [with_logprobs(number + 1, *shape) for number, shape in enumerate(lengths)]
    found = []
    for rank in range(context_size):
        batch = make(
            sequences, packed=packed, align=2 * context_size * factor, context_size=context_size, context_rank=rank
        )
        assert batch.input_ids.shape == batch.position_ids.shape
        tokens, places = batch.input_ids.flatten(), batch.position_ids.flatten()
        for n in range(len(batch.positions)):
            before, target = int(tokens[batch.positions[n]]), int(batch.targets[n])
            assert target == before + 1  # ids name their place, so the next place is the next id
            assert int(places[batch.positions[n]]) == before % 1000
            owner = sequences[int(batch.response[n])]
            assert owner.response_ids[int(batch.token[n])] == target
            assert batch.old_logprobs[n] == owner.old_logprobs[int(batch.token[n])]
            assert (batch.advantages[n], batch.weights[n]) == (owner.advantage, owner.weight)
            found.append((owner.number, int(batch.token[n])))
    assert sorted(found) == [(s.number, t) for s in sequences for t in range(len(s.response_ids))]


@settings(deadline=None, database=None, max_examples=40)
@given(shapes, st.sampled_from([2, 4]), st.integers(0, 3))
def test_the_local_row_is_the_zigzag_part_of_every_sequence_in_order(lengths, context_size, rank):
    rank %= context_size
    sequences = [sequence(number + 1, *shape) for number, shape in enumerate(lengths)]
    whole = make(sequences, align=2 * context_size)
    part = make(sequences, align=2 * context_size, context_size=context_size, context_rank=rank)
    expected = [
        ids[piece]
        for ids in whole.input_ids[0].split(whole.packed.plan.lengths)
        for piece in zigzag_slices(len(ids), context_size, rank)
    ]
    assert torch.equal(part.input_ids[0], torch.cat(expected))
