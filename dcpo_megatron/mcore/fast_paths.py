"""Megatron-Core's and Transformer Engine's faster ways of doing the same, each asked for as ``auto``, ``on`` or
``off``.

    key                                 what it does                                     auto takes it
    model.bias_activation_fusion        a feed-forward layer's activation in one kernel  on a GPU where Triton compiles
    model.gradient_accumulation_fusion  products add up the weights' gradients           on a GPU with TE layers or Apex
    model.grouped_experts               one product for all experts of a rank            with TE layers
    model.moe_permute_fusion            tokens go to their experts in one kernel         with TE layers on a GPU
    parallel.overlap_grad_reduce        gradients travel beside the backward pass        on a GPU
    parallel.overlap_param_gather       weights travel beside the next forward pass      with the line above, and Adam

(TE: Transformer Engine.) ``on`` where it cannot be had is refused with the reason. Nothing here imports Megatron-Core:
the configuration is checked with it before a rank starts.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from dcpo_megatron.mcore.head.backend import missing_for_triton
from dcpo_megatron.mcore.layout import ParallelLayout
from dcpo_megatron.mcore.platform import Platform

DISPATCHERS = ("alltoall", "allgather", "flex")


@dataclass(frozen=True)
class FastPaths:
    """What a model is built with."""

    bias_activation_fusion: bool
    gradient_accumulation_fusion: bool
    grouped_experts: bool
    moe_permute_fusion: bool


def choose(key: str, wanted: str, auto: bool, missing: str | None, problems: list[str]) -> bool:
    """Whether ``key`` is taken; where it is demanded and something is ``missing``, a sentence goes to ``problems``."""
    if wanted not in ("auto", "on", "off"):
        problems.append(f"{key}={wanted!r} is not known: use auto, on or off")
        return False
    if wanted == "on" and missing:
        problems.append(f"{key}=on, but {missing}: set {key}=auto")
    return missing is None and (wanted == "on" or (wanted == "auto" and auto))


def choose_model_paths(
    options, platform: Platform, transformer_engine: bool, experts: int
) -> tuple[FastPaths, list[str]]:
    """The paths of a model, and what is wrong with them.

    ``options``: :class:`~dcpo_megatron.mcore.model.ModelOptions`, or a section of the configuration with its fields.
    """
    problems: list[str] = []
    gpu = not platform.is_cpu
    without = None if transformer_engine else "the layers are not Transformer Engine's"
    no_experts = None if experts else "the model has no experts"
    no_kernel = "neither Transformer Engine's layers nor Apex's fused_weight_gradient_mlp_cuda can be had"
    apex = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    paths = FastPaths(
        choose(
            "model.bias_activation_fusion",
            options.bias_activation_fusion,
            gpu and missing_for_triton("cuda") is None,
            None,
            problems,
        ),
        choose(
            "model.gradient_accumulation_fusion",
            options.gradient_accumulation_fusion,
            gpu,
            None if transformer_engine or apex else no_kernel,
            problems,
        ),
        choose("model.grouped_experts", options.grouped_experts, True, no_experts or without, problems),
        choose("model.moe_permute_fusion", options.moe_permute_fusion, gpu, no_experts or without, problems),
    )  # fmt: skip
    return paths, problems


def dispatcher_problems(dispatcher: str, layout: ParallelLayout, experts: int, platform: Platform) -> list[str]:
    """Why ``parallel.token_dispatcher`` cannot serve ``layout``."""
    if dispatcher not in DISPATCHERS:
        return [f"parallel.token_dispatcher={dispatcher!r} is not known: use {', '.join(DISPATCHERS)}"]
    if not experts or dispatcher == "alltoall":
        return []
    found = []
    if dispatcher == "flex":
        if platform.is_cpu or importlib.util.find_spec("deep_ep") is None:
            found.append("parallel.token_dispatcher=flex needs a GPU and the package deep_ep: use alltoall")
        return found
    if layout.pipeline > 1:
        found.append(
            "parallel.token_dispatcher=allgather does not work with parallel.pipeline above 1 (stages exchange rows of"
            " any length): use alltoall"
        )
    group = layout.expert * (layout.expert_tensor or layout.tensor)
    if (layout.tensor * layout.context) % group:
        found.append(
            "parallel.token_dispatcher=allgather needs as many tokens on every rank that shares experts; with "
            f"expert x expert_tensor = {group} they are in several of the groups of tensor x context = "
            f"{layout.tensor * layout.context}, whose rows differ: use alltoall"
        )
    return found


def choose_overlap(
    grad_reduce: str, param_gather: str, sharded: bool, platform: Platform
) -> tuple[bool, bool, list[str]]:
    """``(overlap_grad_reduce, overlap_param_gather, problems)``.

    ``sharded``: whether the optimizer's state is split over data-parallel ranks.
    """
    problems: list[str] = []
    reduces = choose("parallel.overlap_grad_reduce", grad_reduce, not platform.is_cpu, None, problems)
    missing = None
    if not sharded:
        missing = "weights are gathered only where the optimizer's state is sharded (optimizer.name=adam)"
    elif not reduces:
        missing = "parallel.overlap_grad_reduce is not on"
    gathers = choose("parallel.overlap_param_gather", param_gather, True, missing, problems)
    return reduces, gathers, problems


def finish_gathering(chunks) -> None:
    """Parameters are whole and new when this returns; collective where weights travel beside the forward pass, else
    nothing.

    Megatron-Core then gathers a bucket when a module that needs it is called. Whoever reads weights otherwise (to
    publish or save them) calls this first.
    """
    for chunk in chunks:
        if not getattr(chunk, "use_forward_hook", False):
            continue
        for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
            if not group.param_gather_dispatched or group.param_gather_handle is not None:
                group.start_param_sync(force_sync=True)


def finish_gathering_of(module) -> None:
    """The same for the parameters of a module whose weight is read without calling it: what its call would wait for."""
    for hook in list(module._forward_pre_hooks.values()):
        hook(module, ())
