"""Hugging Face tensors -> Megatron tensor -> tensor-parallel parts and back, bit for bit."""

from dataclasses import replace

import pytest
import torch

from dcpo_megatron.mcore.hf_config import ModelShape
from dcpo_megatron.weights.mapping import (
    UnknownParameter,
    full_shape,
    hf_names,
    hf_shapes,
    merge,
    parameter_names,
    rule_for,
    shard,
    split,
    unshard,
)

SHAPE = ModelShape(
    model_type="qwen2",
    layers=2,
    hidden=12,
    heads=4,
    kv_heads=4,
    head_dim=6,
    ffn=16,
    vocab=10,
    max_positions=64,
    norm_eps=1e-6,
    tied_embeddings=False,
    qkv_bias=True,
    qk_norm=False,
    rope_base=1e4,
    inverse_frequencies=(1.0, 0.1, 0.01),
)
EXPERTS = replace(
    SHAPE, model_type="qwen3_moe", qkv_bias=False, qk_norm=True, experts=4, experts_per_token=2, expert_ffn=8
)
# Heads, key-value heads, tensor sizes that divide both.
LAYOUTS = [
    (4, 4, (1, 2, 4)),
    (8, 4, (1, 2, 4)),
    (12, 4, (1, 2, 4)),
    (14, 2, (1, 2)),
    (3, 1, (1,)),
]
HEADS = [(heads, kv_heads, size) for heads, kv_heads, sizes in LAYOUTS for size in sizes]


def numbered(*size, dtype=torch.float32):
    """A tensor in which no two values are equal."""
    numbered.next = getattr(numbered, "next", 0) + 1
    count = torch.Size(size).numel()
    return (torch.arange(count, dtype=torch.float32) + 1000.0 * numbered.next).reshape(size).to(dtype)


def round_trip(rule, tensors, shape, size, rows=None):
    """Merged, cut for ``size`` ranks, joined and split again; also the parts."""
    full = merge(rule, tensors, shape, rows)
    parts = [shard(rule, full, rank, size) for rank in range(size)]
    return split(rule, unshard(rule, parts), shape), parts


def assert_same(found, rule, tensors):
    assert [name for name, _ in found] == list(rule.hf_names)
    for (name, tensor), original in zip(found, tensors, strict=True):
        assert tensor.dtype == original.dtype and torch.equal(tensor, original), name


@pytest.mark.parametrize(("heads", "kv_heads", "size"), HEADS)
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_queries_keys_and_values_survive_a_round_trip_exactly(heads, kv_heads, size, part):
    shape = replace(SHAPE, heads=heads, kv_heads=kv_heads)
    rest = (shape.hidden,) if part == "weight" else ()
    tensors = [numbered(n * shape.head_dim, *rest) for n in (heads, kv_heads, kv_heads)]
    rule = rule_for(f"decoder.layers.0.self_attention.linear_qkv.{part}", SHAPE)
    found, parts = round_trip(rule, tensors, shape, size)
    assert_same(found, rule, tensors)
    assert {p.shape for p in parts} == {torch.Size(((heads + 2 * kv_heads) * shape.head_dim // size, *rest))}


@pytest.mark.parametrize(("heads", "kv_heads", "size"), HEADS)
def test_each_tensor_rank_holds_whole_query_groups_q_heads_then_k_then_v(heads, kv_heads, size):
    shape = replace(SHAPE, heads=heads, kv_heads=kv_heads)
    q, k, v = (numbered(n, shape.head_dim, shape.hidden) for n in (heads, kv_heads, kv_heads))
    rule = rule_for("decoder.layers.0.self_attention.linear_qkv.weight", SHAPE)
    full = merge(rule, [t.flatten(0, 1) for t in (q, k, v)], shape)
    per_rank, per_group = kv_heads // size, heads // kv_heads
    for rank in range(size):
        expected = []
        for group in range(rank * per_rank, (rank + 1) * per_rank):
            expected += [q[group * per_group + n] for n in range(per_group)] + [k[group], v[group]]
        assert torch.equal(shard(rule, full, rank, size), torch.cat(expected))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    "name", ["mlp.linear_fc1.weight", "mlp.experts.local_experts.0.linear_fc1.weight"], ids=["dense", "expert"]
)
def test_gate_and_up_are_split_each_on_its_own(name, size):
    gate, up = numbered(16, 12), numbered(16, 12)
    rule = rule_for(f"decoder.layers.0.{name}", EXPERTS if "experts" in name else SHAPE)
    found, parts = round_trip(rule, [gate, up], SHAPE, size)
    assert_same(found, rule, [gate, up])
    rows = 16 // size
    for rank, part in enumerate(parts):
        here = slice(rank * rows, (rank + 1) * rows)
        assert torch.equal(part, torch.cat([gate[here], up[here]]))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", ["self_attention.linear_proj.weight", "mlp.linear_fc2.weight"])
def test_row_parallel_weights_are_split_along_their_input(name, size):
    weight = numbered(12, 16)
    rule = rule_for(f"decoder.layers.0.{name}", SHAPE)
    found, parts = round_trip(rule, [weight], SHAPE, size)
    assert_same(found, rule, [weight])
    assert torch.equal(parts[-1], weight[:, -16 // size :])


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.input_layernorm.weight",
        "decoder.layers.0.self_attention.q_layernorm.weight",
        "decoder.layers.0.mlp.router.weight",
        "decoder.final_layernorm.weight",
    ],
)
def test_every_tensor_rank_holds_the_whole_of_a_plain_parameter(name, size):
    weight = numbered(12)
    rule = rule_for(name, EXPERTS)
    found, parts = round_trip(rule, [weight], SHAPE, size)
    assert_same(found, rule, [weight])
    assert all(torch.equal(part, weight) for part in parts)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", ["embedding.word_embeddings.weight", "output_layer.weight"])
@pytest.mark.parametrize("rows", [None, 10, 16, 512])
def test_padding_rows_of_the_vocabulary_are_zero_and_never_come_back(name, rows, size):
    if (rows or SHAPE.vocab) % size:
        rows = 12
    weight = numbered(SHAPE.vocab, SHAPE.hidden)
    rule = rule_for(name, SHAPE)
    full = merge(rule, [weight], SHAPE, rows)
    assert full.shape[0] == (rows or SHAPE.vocab) and not full[SHAPE.vocab :].any()
    full[SHAPE.vocab :] = 7.0  # whatever training made of them
    parts = [shard(rule, full, rank, size) for rank in range(size)]
    assert {part.shape[0] for part in parts} == {len(full) // size}
    assert_same(split(rule, unshard(rule, parts), SHAPE), rule, [weight])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
def test_the_dtype_of_the_checkpoint_is_kept(dtype):
    tensors = [numbered(24, 12, dtype=dtype) for _ in range(3)]
    rule = rule_for("decoder.layers.0.self_attention.linear_qkv.weight", SHAPE)
    assert_same(round_trip(rule, tensors, SHAPE, 2)[0], rule, tensors)


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "megatron", "kind", "names"),
    [
        (SHAPE, "embedding.word_embeddings.weight", "column", ["model.embed_tokens.weight"]),
        (SHAPE, "output_layer.weight", "column", ["lm_head.weight"]),
        (SHAPE, "decoder.final_layernorm.weight", "plain", ["model.norm.weight"]),
        (SHAPE, "decoder.layers.0.input_layernorm.weight", "plain", ["model.layers.5.input_layernorm.weight"]),
        (
            SHAPE,
            "decoder.layers.1.self_attention.linear_qkv.bias",
            "qkv",
            [f"model.layers.6.self_attn.{p}_proj.bias" for p in "qkv"],
        ),
        (
            SHAPE,
            "decoder.layers.0.pre_mlp_layernorm.weight",
            "plain",
            ["model.layers.5.post_attention_layernorm.weight"],
        ),
        (
            SHAPE,
            "decoder.layers.12.mlp.linear_fc1.weight",
            "gated",
            ["model.layers.17.mlp.gate_proj.weight", "model.layers.17.mlp.up_proj.weight"],
        ),
        (EXPERTS, "decoder.layers.0.mlp.router.weight", "plain", ["model.layers.5.mlp.gate.weight"]),
        (
            EXPERTS,
            "decoder.layers.2.mlp.experts.local_experts.3.linear_fc1.weight",
            "gated",
            [f"model.layers.7.mlp.experts.19.{p}_proj.weight" for p in ("gate", "up")],
        ),
        (
            EXPERTS,
            "decoder.layers.0.mlp.experts.local_experts.10.linear_fc2.weight",
            "row",
            ["model.layers.5.mlp.experts.26.down_proj.weight"],
        ),
    ],
)
def test_names_are_counted_from_the_first_layer_and_expert_of_the_rank(shape, megatron, kind, names):
    rule = rule_for(megatron, shape, layer_offset=5, expert_offset=16)
    assert (rule.kind, list(rule.hf_names)) == (kind, names)
    assert rule.expert == ("experts" in megatron) and rule.vocab == (
        names[0].split(".")[-2] in ("embed_tokens", "lm_head")
    )


def test_a_norm_fused_into_the_linear_layer_after_it_is_the_same_tensor():
    for fused, plain in (
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    ):
        assert rule_for(f"decoder.layers.3.{fused}", SHAPE) == rule_for(f"decoder.layers.3.{plain}", SHAPE)


def test_a_tied_output_layer_is_the_embedding_and_no_parameter_of_its_own():
    tied = replace(SHAPE, tied_embeddings=True)
    assert rule_for("output_layer.weight", tied) == rule_for("embedding.word_embeddings.weight", tied)
    assert rule_for("output_layer.weight", tied).hf_names == ("model.embed_tokens.weight",)
    assert parameter_names(SHAPE) == [*parameter_names(tied), "output_layer.weight"]
    assert hf_names(SHAPE) == [*hf_names(tied), "lm_head.weight"]


def test_parameters_are_listed_from_the_embedding_to_the_output_layer_with_global_numbers():
    names = parameter_names(EXPERTS)
    assert names[0] == "embedding.word_embeddings.weight"
    assert names[-2:] == ["decoder.final_layernorm.weight", "output_layer.weight"]
    assert [name for name in names if "layers.1.mlp.experts" in name] == [
        f"decoder.layers.1.mlp.experts.local_experts.{expert}.linear_fc{n}.weight"
        for expert in range(4)
        for n in (1, 2)
    ]
    layers = [int(name.split(".")[2]) for name in names[1:-2]]
    assert layers == sorted(layers) and set(layers) == {0, 1} and len(set(names)) == len(names)


@pytest.mark.parametrize("shape", [SHAPE, EXPERTS, replace(SHAPE, tied_embeddings=True, heads=8, kv_heads=2)])
def test_the_merged_tensor_has_the_full_shape_that_the_rule_says(shape):
    for name in parameter_names(shape):
        rule = rule_for(name, shape)
        full = merge(rule, [torch.zeros(size) for size in hf_shapes(rule, shape)], shape, 16)
        assert tuple(full.shape) == full_shape(rule, name, shape, 16), name


def test_a_vocabulary_is_never_padded_down():
    rule = rule_for("output_layer.weight", SHAPE)
    with pytest.raises(ValueError, match=r"output_layer.weight would have 9 rows for a vocabulary of 10"):
        full_shape(rule, "output_layer.weight", SHAPE, 9)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.self_attention.linear_qkv.scale",
        "decoder.layers.0.self_attention.q_layernorm.weight",  # another family's
        "decoder.layers.0.mlp.router.weight",
        "decoder.layers.0.mlp.shared_experts.linear_fc1.weight",
        "decoder.layers.x.input_layernorm.weight",
        "mtp.layers.0.input_layernorm.weight",
        "output_layer.bias",
        "",
    ],
)
def test_a_parameter_that_the_familys_table_does_not_know_is_refused_by_name(name):
    with pytest.raises(UnknownParameter) as caught:
        rule_for(name, SHAPE)
    assert str(caught.value) == f"Megatron parameter {name!r} has no Hugging Face counterpart in the table of qwen2"
