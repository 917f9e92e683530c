"""Minibatches keep prompts whole, and the weights of a minibatch do not depend on how it is laid out."""

import math
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpo_megatron.advantages import RewardHistory
from dcpo_megatron.data import Response
from dcpo_megatron.data.packing import PackingOptions
from dcpo_megatron.mcore.step import UpdateResult
from dcpo_megatron.monitor.timeline import Timeline
from dcpo_megatron.objectives import get_preset
from dcpo_megatron.training.minibatches import MinibatchMaker, plan_minibatch, split_minibatches, token_weights
from dcpo_megatron.training.rollout_phase import RolloutPhase
from tests.training.tables import table_of_responses

OTM, SLM, TLM, DR = (get_preset(name) for name in ("dcpo-paper", "grpo", "dapo", "dr-grpo"))


def response(prompt, sample, tokens, prompt_tokens=2):
    return Response(
        prompt_id=prompt,
        prompt_token_ids=[1] * prompt_tokens,
        ground_truth="",
        sample_index=sample,
        token_ids=list(range(10, 10 + tokens)),
        rollout_logprobs=[-0.5 - 0.25 * t for t in range(tokens)],
        finish_reason="stop" if tokens else "abort",
        weight_versions=[0] * tokens,
        advantage=float(sample) - 1.0,
    )


def batch_of(*lengths_per_prompt):
    return table_of_responses([
        response(f"prompt-{number}", sample, tokens)
        for number, lengths in enumerate(lengths_per_prompt)
        for sample, tokens in enumerate(lengths)
    ])  # fmt: skip


def weights_of(table, objective):
    return token_weights(table, np.arange(len(table)), objective, 20)


groups = st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=5), min_size=1, max_size=6)


@settings(deadline=None, database=None)
@given(groups, st.integers(1, 4))
def test_minibatches_keep_prompts_whole_and_in_order(lengths, prompts):
    table = batch_of(*lengths)
    minibatches = split_minibatches(table, prompts)
    assert list(chain.from_iterable(minibatches)) == list(range(len(table)))
    ids = [{table.prompt_id(row) for row in rows} for rows in minibatches]
    assert all(not first & second for n, first in enumerate(ids) for second in ids[n + 1 :])
    assert [len(found) for found in ids[:-1]] == [prompts] * (len(ids) - 1)
    assert 1 <= len(ids[-1]) <= prompts


def test_no_responses_give_no_minibatch():
    assert split_minibatches(batch_of(), 4) == []


def test_weights_are_those_of_each_aggregation_over_the_whole_minibatch():
    table = batch_of([4, 0], [2, 8])
    assert weights_of(table, OTM) == pytest.approx([1 / 8, 0.0, 1 / 4, 1 / 16])
    assert weights_of(table, SLM) == pytest.approx([1 / 16, 0.0, 1 / 8, 1 / 32])
    assert weights_of(table, TLM) == pytest.approx([1 / 14, 0.0, 1 / 14, 1 / 14])
    assert weights_of(table, DR) == pytest.approx([1 / 80, 0.0, 1 / 80, 1 / 80])


def test_a_prompt_with_empty_responses_alone_still_counts_in_the_weights():
    assert weights_of(batch_of([5], [0, 0]), OTM) == pytest.approx([1 / 10, 0.0, 0.0])


@settings(deadline=None, database=None)
@given(groups, st.sampled_from([OTM, SLM, TLM, DR]))
def test_the_weights_of_all_tokens_sum_to_what_the_aggregation_says(lengths, objective):
    table = batch_of(*lengths)
    total = math.fsum(weights_of(table, objective) * table.length)
    trained = [sum(n > 0 for n in group) for group in lengths]
    expected = {
        "otm": sum(trained) / len(lengths),  # G where every response has tokens
        "slm": sum(count / len(group) for count, group in zip(trained, lengths, strict=True)) / len(lengths),
        "tlm": float(any(trained)),
        "dr": sum(map(sum, lengths)) / (len(table) * 20),
    }
    assert total == pytest.approx(expected[objective.aggregation], rel=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3])
@settings(deadline=None, database=None, max_examples=40)
@given(groups, st.booleans(), st.sampled_from([1, 2]), st.integers(0, 2))
def test_all_ranks_together_train_on_every_response_with_tokens_exactly_once(size, lengths, packed, multiple_of, skip):
    table = batch_of([3], *lengths)
    rows = np.arange(len(table))[skip:]
    packing = PackingOptions(24, packed=packed, align=4)
    plan = plan_minibatch(table, rows, packing, size, multiple_of)
    assert len(plan) == size and len({len(part) for part in plan}) == 1 and len(plan[0]) % multiple_of == 0
    trained = sorted(chain.from_iterable(chain.from_iterable(plan)))
    assert trained == [row for row in rows if table.length[row]]


def made(table, held):
    """One minibatch of all rows, by a run of one rank."""
    maker = MinibatchMaker(SLM, PackingOptions(64), 99, 20, 1, 0, (0,), Timeline())
    (rows,), (minibatch,) = maker.make(table, held)
    assert rows.tolist() == list(range(len(table)))
    return minibatch


def test_a_sequence_carries_its_responses_tokens_advantage_and_rollout_logprobs():
    held = [response("p", sample, tokens) for sample, tokens in enumerate([3, 0, 2])]
    (micro_batch,) = made(table_of_responses(held), held)
    found = {s.number: s for s in micro_batch}
    assert set(found) == {0, 2}
    assert found[2].response_ids.tolist() == [10, 11] and found[2].prompt_ids == [1, 1]
    assert found[2].advantage == 1.0
    assert found[2].weight == pytest.approx(1 / 6)
    assert torch.equal(found[2].rollout_logprobs, torch.tensor([-0.5, -0.75]))
    assert found[2].old_logprobs is None


def test_a_minibatch_without_any_token_gives_every_rank_one_empty_micro_batch():
    table = batch_of([0, 0], [0])
    assert plan_minibatch(table, np.arange(3), PackingOptions(24), 2) == [[[]], [[]]]


def test_prompts_of_an_update_that_was_left_out_have_not_been_visited():
    history = RewardHistory()
    ids = [f"p{number // 2}" for number in range(8)]
    for _ in range(2):
        history.observe(ids, torch.tensor([0.0, 1.0] * 4))
    table = table_of_responses([response(prompt_id, number % 2, 1) for number, prompt_id in enumerate(ids)])
    updates = [UpdateResult({}, {}, 1.0, stepped, 1e-6) for stepped in (True, False)]
    phase = SimpleNamespace(history=history)
    RolloutPhase.take_back_visits(phase, table, split_minibatches(table, 2), updates)
    assert [history.visits(f"p{number}") for number in range(4)] == [2, 2, 1, 1]
