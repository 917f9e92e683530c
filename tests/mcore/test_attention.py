"""Packed and context-parallel rows against a plain softmax over each sequence, values and gradients."""

import math
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpo_megatron.mcore import attention
from dcpo_megatron.mcore.attention import (
    MAX_PADDING,
    AttentionBlock,
    AttentionPlan,
    CausalCoreAttention,
    PackedRow,
    group_blocks,
    zigzag_inverse,
    zigzag_slices,
)

CPU = torch.device("cpu")
WIDTH = 4
# Lengths whose blocks share calls, stand alone, have one token; a whole row; all of one length.
ROWS = [[5, 1, 9, 2, 6, 30], [7], [1], [1, 1, 1], [4, 4, 4], [40, 1, 39, 2]]
# Query heads, key-value heads.
HEADS = [(2, 2), (4, 2), (6, 1)]


def core_attention(context_size=1, context_rank=0, **config):
    group = SimpleNamespace(size=lambda: context_size, rank=lambda: context_rank)
    settings_ = SimpleNamespace(attention_dropout=0.0, window_size=None)
    settings_.__dict__.update(config)
    return CausalCoreAttention(settings_, 1, None, "self", pg_collection=SimpleNamespace(cp=group))


def row(lengths, heads, kv_heads, seed=0):
    """Leaf tensors query ``[T, heads, d]``, key and value ``[T, kv_heads, d]``, and a direction for the gradient."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    query, key, value = (torch.randn(total, n, WIDTH, generator=generator) for n in (heads, kv_heads, kv_heads))
    return [t.requires_grad_() for t in (query, key, value)], torch.randn(total, heads * WIDTH, generator=generator)


def naive(query, key, value, lengths, scale=None):
    """Softmax attention sequence by sequence and head by head."""
    heads, outputs = query.shape[1], []
    for q, k, v in zip(*(t.split(lengths) for t in (query, key, value)), strict=True):
        k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or 1 / math.sqrt(WIDTH))
        future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
    return torch.cat(outputs)


def gradients(output, direction, leaves):
    return torch.autograd.grad((output * direction).sum(), leaves)


def assert_close(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("lengths", ROWS, ids=str)
def test_a_packed_row_equals_attention_over_each_sequence_alone(lengths, heads, kv_heads):
    leaves, direction = row(lengths, heads, kv_heads)
    packed = PackedRow(AttentionPlan(lengths).build(CPU), CPU)
    output = core_attention()(*leaves, packed_seq_params=packed)
    expected = naive(*leaves, lengths)
    assert_close([output], [expected])
    assert_close(gradients(output, direction, leaves), gradients(expected, direction, leaves))


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_padded_rows_equal_attention_over_each_row_alone(heads, kv_heads):
    batch, sequence = 3, 5
    leaves, direction = row([sequence] * batch, heads, kv_heads)
    # Megatron-Core's order is [S, B, heads, d].
    rows = [t.view(batch, sequence, *t.shape[1:]).transpose(0, 1) for t in leaves]
    output = core_attention()(*rows)
    assert output.shape == (sequence, batch, heads * WIDTH)
    output = output.transpose(0, 1).reshape(batch * sequence, -1)
    expected = naive(*leaves, [sequence] * batch)
    assert_close([output], [expected])
    assert_close(gradients(output, direction, leaves), gradients(expected, direction, leaves))


def test_a_softmax_scale_replaces_the_usual_one():
    leaves, _ = row([3, 4], 2, 2)
    module = core_attention()
    module.softmax_scale = 0.9
    packed = PackedRow(AttentionPlan([3, 4]).build(CPU), CPU)
    assert_close([module(*leaves, packed_seq_params=packed)], [naive(*leaves, [3, 4], scale=0.9)])


def test_a_packed_rows_boundaries_are_those_of_its_sequences():
    packed = PackedRow(AttentionPlan([3, 5, 2]).build(CPU), CPU)
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 3, 8, 10]
    assert packed.cu_seqlens_q.dtype == torch.int32
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 5
    assert packed.qkv_format == "thd"


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"attention_dropout": 0.1}, "attention_dropout=0.1"), ({"window_size": 4}, "window_size=4")],
)
def test_dropout_and_sliding_windows_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        core_attention(**setting)


# -- grouping of blocks ----------------------------------------------------------------------------

blocks_of = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 200)), min_size=1, max_size=30).map(
    lambda pairs: [AttentionBlock(10 * n, 100 * n, offset, length) for n, (offset, length) in enumerate(pairs)]
)


@settings(deadline=None, database=None)
@given(blocks_of)
def test_every_block_is_in_one_group_and_no_group_pads_more_than_allowed(blocks):
    groups = group_blocks(blocks)
    assert sorted(chain.from_iterable(groups), key=lambda b: b.query_start) == blocks
    for group in groups:
        padded = len(group) * max(b.length for b in group) * max(b.keys for b in group)
        assert 1 - sum(b.length * b.keys for b in group) / padded <= MAX_PADDING + 1e-9
    assert group_blocks(list(reversed(blocks))) == groups


def test_blocks_of_one_size_share_one_call_and_very_different_ones_do_not():
    assert [len(g) for g in group_blocks([AttentionBlock(n, n, 0, 8) for n in range(6)])] == [6]
    assert [len(g) for g in group_blocks([AttentionBlock(0, 0, 0, 100), AttentionBlock(100, 100, 0, 3)])] == [1, 1]


# -- context parallelism ---------------------------------------------------------------------------


@pytest.mark.parametrize("context_size", [1, 2, 4])
def test_the_slices_of_all_ranks_cut_a_sequence_once_with_equal_shares_of_causal_pairs(context_size):
    length = 16
    held = []
    for rank in range(context_size):
        first, second = zigzag_slices(length, context_size, rank)
        mine = [*range(length)[first], *range(length)[second]]
        held += mine
        assert len(mine) == length // context_size
        assert sum(place + 0.5 for place in mine) == sum(place + 0.5 for place in range(length)) / context_size
    assert sorted(held) == list(range(length))


@pytest.mark.parametrize("context_size", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[8], [8, 16, 24], [16, 8, 8, 40]], ids=str)
def test_the_inverse_restores_the_order_of_a_gathered_packed_row(context_size, lengths):
    row_ = torch.arange(sum(lengths))
    sequences = row_.split(lengths)
    gathered = torch.cat(
        [
            sequence[piece]
            for rank in range(context_size)
            for sequence in sequences
            for piece in zigzag_slices(len(sequence), context_size, rank)
        ]
    )
    assert torch.equal(gathered[zigzag_inverse(lengths, context_size)], row_)
    assert context_size == 1 or not torch.equal(gathered, row_)


def held_by(tensor, lengths, context_size, rank):
    """The rows of a packed tensor that one rank holds, in its order."""
    pieces = [
        sequence[piece]
        for sequence in tensor.split(lengths)
        for piece in zigzag_slices(len(sequence), context_size, rank)
    ]
    return torch.cat(pieces)


def on_every_rank(leaves, lengths, context_size, monkeypatch, run):
    """``run(module, query, key, value, rank)`` per rank with its own part; keys and values are gathered by hand. Joined
    in the row's order.

    The hand-made gather hands every rank the same leaves, so that autograd sums their gradients over ranks as the
    collective does.
    """
    outputs = []
    for rank in range(context_size):
        parts = [held_by(t, lengths, context_size, rank) for t in leaves]
        expected = iter(parts[1:])
        gathered = iter(
            [torch.cat([held_by(t, lengths, context_size, r) for r in range(context_size)]) for t in leaves[1:]]
        )

        def gather(tensor, tensor_parallel_output_grad, group, expected=expected, gathered=gathered):
            assert torch.equal(tensor, next(expected)) and tensor_parallel_output_grad
            return next(gathered)

        monkeypatch.setattr(attention, "gather_from_sequence_parallel_region", gather)
        outputs.append(run(core_attention(context_size, rank), *parts, rank))
    return torch.cat(outputs)[zigzag_inverse(lengths, context_size)]


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("context_size", [2, 4])
@pytest.mark.parametrize("lengths", [[8], [8, 24, 16], [8, 8, 80]], ids=str)
def test_context_parallel_packed_rows_equal_one_rank(lengths, context_size, heads, kv_heads, monkeypatch):
    leaves, direction = row(lengths, heads, kv_heads)

    def run(module, query, key, value, rank):
        packed = PackedRow(AttentionPlan(lengths, context_size, rank).build(CPU), CPU)
        return module(query, key, value, packed_seq_params=packed)

    output = on_every_rank(leaves, lengths, context_size, monkeypatch, run)
    expected = naive(*leaves, lengths)
    assert_close([output], [expected])
    assert_close(gradients(output, direction, leaves), gradients(expected, direction, leaves))


def test_context_parallel_padded_rows_equal_one_rank(monkeypatch):
    batch, sequence, context_size = 3, 8, 2
    lengths = [sequence] * batch
    leaves, direction = row(lengths, 4, 2)

    def run(module, query, key, value, rank):
        rows = [t.view(batch, sequence // context_size, *t.shape[1:]).transpose(0, 1) for t in (query, key, value)]
        output = module(*rows)
        assert output.shape == (sequence // context_size, batch, 4 * WIDTH)
        return output.transpose(0, 1).flatten(0, 1)

    output = on_every_rank(leaves, lengths, context_size, monkeypatch, run)
    expected = naive(*leaves, lengths)
    assert_close([output], [expected])
    assert_close(gradients(output, direction, leaves), gradients(expected, direction, leaves))


@pytest.mark.parametrize(("length", "context_size"), [(6, 2), (7, 2), (4, 4), (12, 4)])
def test_a_length_that_does_not_divide_into_the_zigzag_is_refused(length, context_size):
    message = (
        f"sequence of {length} tokens: context parallelism of {context_size} needs a multiple of {2 * context_size}"
    )
    with pytest.raises(ValueError, match=message):
        AttentionPlan([16, length], context_size, 0).build(CPU)
