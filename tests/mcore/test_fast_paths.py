"""Which faster ways are taken: `auto` by platform, `on` refused with the reason where it cannot be had."""

from dataclasses import replace

import pytest
import torch

from dcpo_megatron.mcore.fast_paths import choose_model_paths, choose_overlap, dispatcher_problems
from dcpo_megatron.mcore.hf_config import shape_of
from dcpo_megatron.mcore.layout import ParallelLayout
from dcpo_megatron.mcore.model import ModelOptions, transformer_config
from dcpo_megatron.mcore.platform import Platform
from dcpo_megatron.verification.cases import tiny_config

CPU = Platform("cpu", "gloo", torch.device("cpu"))
GPU = Platform("cuda", "nccl", torch.device("cuda", 0))


@pytest.fixture(autouse=True)
def triton_compiles(monkeypatch):
    monkeypatch.setattr("dcpo_megatron.mcore.fast_paths.missing_for_triton", lambda device: None)


def taken(options, platform, engine, experts=4):
    paths, problems = choose_model_paths(options, platform, engine, experts)
    return {name for name, value in vars(paths).items() if value}, problems


def test_auto_takes_what_the_platform_and_the_layers_have():
    everything = {
        "bias_activation_fusion",
        "gradient_accumulation_fusion",
        "grouped_experts",
        "moe_permute_fusion",
    }
    assert taken(ModelOptions(), GPU, True) == (everything, [])
    assert taken(ModelOptions(), GPU, True, experts=0) == (everything - {"grouped_experts", "moe_permute_fusion"}, [])
    assert taken(ModelOptions(), GPU, False) == ({"bias_activation_fusion"}, [])
    assert taken(ModelOptions(), CPU, False) == (set(), [])
    assert taken(ModelOptions(**dict.fromkeys(everything, "off")), GPU, True) == (set(), [])


def test_a_way_that_is_demanded_and_cannot_be_had_is_refused_with_the_reason():
    demanded = dict.fromkeys(("gradient_accumulation_fusion", "grouped_experts", "moe_permute_fusion"), "on")
    found, problems = taken(ModelOptions(**demanded), GPU, False)
    assert found == {"bias_activation_fusion"} and len(problems) == 3
    assert "fused_weight_gradient_mlp_cuda" in problems[0]
    assert all("the layers are not Transformer Engine's" in problem for problem in problems[1:])
    with pytest.raises(ValueError, match=r"model\.grouped_experts=on, but"):
        transformer_config(shape_of(tiny_config("moe")), ParallelLayout(), ModelOptions(grouped_experts="on"), CPU)
    assert "use auto, on or off" in taken(ModelOptions(grouped_experts="yes"), GPU, True)[1][0]


def test_megatron_core_is_told():
    shape, options = shape_of(tiny_config("moe")), ModelOptions(bias_activation_fusion="on")
    config = transformer_config(shape, ParallelLayout(), options, CPU)
    assert config.bias_activation_fusion and not config.moe_grouped_gemm and not config.gradient_accumulation_fusion
    config = transformer_config(shape, ParallelLayout(), replace(options, token_dispatcher="allgather"), CPU)
    assert config.moe_token_dispatcher_type == "allgather"


@pytest.mark.parametrize(("words", "sharded", "platform", "found"), [
    (("auto", "auto"), True, GPU, (True, True)),
    (("auto", "auto"), False, GPU, (True, False)),
    (("auto", "auto"), True, CPU, (False, False)),
    (("on", "auto"), True, CPU, (True, True)),
    (("off", "auto"), True, GPU, (False, False)),
    (("auto", "off"), True, GPU, (True, False)),
])  # fmt: skip
def test_weights_travel_beside_the_forward_pass_where_gradients_travel_beside_the_backward_pass(
    words, sharded, platform, found
):
    assert choose_overlap(*words, sharded, platform) == (*found, [])


@pytest.mark.parametrize(("words", "sharded", "reason"), [
    (("off", "on"), True, "parallel.overlap_grad_reduce is not on"), (("on", "on"), False, "optimizer.name=adam"),
])  # fmt: skip
def test_weights_cannot_travel_alone_or_unsharded(words, sharded, reason):
    (problem,) = choose_overlap(*words, sharded, GPU)[2]
    assert reason in problem


@pytest.mark.parametrize(("dispatcher", "layout", "words"), [
    ("alltoall", ParallelLayout(expert=2, pipeline=2), None),
    ("allgather", ParallelLayout(expert=2, context=2), None),
    ("allgather", ParallelLayout(expert=2), "as many tokens"),
    ("allgather", ParallelLayout(pipeline=2), "parallel.pipeline above 1"),
    ("flex", ParallelLayout(expert=2), "deep_ep"),
    ("none", ParallelLayout(), "use alltoall, allgather, flex"),
])  # fmt: skip
def test_a_dispatcher_that_cannot_serve_the_layout_is_refused(dispatcher, layout, words):
    found = dispatcher_problems(dispatcher, layout, 4, CPU)
    assert found == [] if words is None else len(found) == 1 and words in found[0]
