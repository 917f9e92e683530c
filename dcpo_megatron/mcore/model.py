"""Builds stock Megatron-Core models from a Hugging Face configuration: GPTModel chunks, DistributedDataParallel around
them, and the optimizer.

Layers come from Transformer Engine for bfloat16 where it imports on a GPU, otherwise from Megatron-Core's local spec
with two parts of ours put in (:mod:`~dcpo_megatron.mcore.norm`, :mod:`~dcpo_megatron.mcore.attention`), since the stock
ones refuse sequence parallelism, packed rows and context parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from dcpo_megatron.mcore import compat  # settles what differs between versions
from dcpo_megatron.mcore.attention import CausalCoreAttention
from dcpo_megatron.mcore.families.base import grouped_dim
from dcpo_megatron.mcore.fast_paths import FastPaths, choose_model_paths, choose_overlap, dispatcher_problems
from dcpo_megatron.mcore.hf_config import ModelShape
from dcpo_megatron.mcore.layout import ParallelLayout, RankPosition, padded_vocab
from dcpo_megatron.mcore.norm import RMSNorm
from dcpo_megatron.mcore.platform import Platform, use_transformer_engine
from dcpo_megatron.mcore.rotary import PositionRotary

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelOptions:
    """How the model is built beyond its shape. ``recompute``: "none" or "full" (activations of each layer recomputed in
    the backward pass)."""

    dtype: str = "float32"
    transformer_engine: str = "auto"  # auto | on | off
    recompute: str = "none"
    vocab_multiple: int = 128
    overlap_p2p: bool = True
    # auto | on | off, see fast_paths.py
    bias_activation_fusion: str = "auto"
    gradient_accumulation_fusion: str = "auto"
    grouped_experts: str = "auto"
    moe_permute_fusion: str = "auto"
    token_dispatcher: str = "alltoall"  # alltoall | allgather | flex


def uses_transformer_engine(options: ModelOptions, platform: Platform) -> bool:
    """Whether layers come from Transformer Engine. Raises ValueError where it is demanded and cannot be had."""
    return use_transformer_engine(options.transformer_engine, options.dtype, platform)


def model_paths(
    shape: ModelShape, layout: ParallelLayout, options: ModelOptions, platform: Platform
) -> tuple[bool, FastPaths]:
    """``(layers from Transformer Engine, the faster ways that are taken)``. Raises ValueError for what is demanded and
    cannot be had."""
    transformer_engine = uses_transformer_engine(options, platform)
    paths, problems = choose_model_paths(options, platform, transformer_engine, shape.experts)
    problems += dispatcher_problems(options.token_dispatcher, layout, shape.experts, platform)
    if problems:
        raise ValueError("; ".join(problems))
    return transformer_engine, paths


def transformer_config(
    shape: ModelShape, layout: ParallelLayout, options: ModelOptions, platform: Platform
) -> TransformerConfig:
    """Megatron-Core's configuration of ``shape`` under ``layout``. Dropout is 0 everywhere (Megatron-Core's own default
    is 0.1)."""
    dtype = DTYPES[options.dtype]
    pipelined = layout.pipeline > 1
    interleaved = layout.interleaved
    transformer_engine, paths = model_paths(shape, layout, options, platform)
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        qk_layernorm=shape.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if interleaved else None,
        num_layers_in_first_pipeline_stage=layout.first_stage_layers,
        # Of two stages the first says it all: given both, Megatron-Core divides by the number of stages between them.
        num_layers_in_last_pipeline_stage=(
            None if layout.pipeline == 2 and layout.first_stage_layers is not None else layout.last_stage_layers
        ),
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor or layout.tensor,
        sequence_parallel=layout.sequence_parallel,
        variable_seq_lengths=pipelined,
        # Checked even without experts: Megatron-Core's default, allgather, refuses variable lengths.
        moe_token_dispatcher_type=options.token_dispatcher if shape.experts else "alltoall",
        # With PP=2 the interleaved schedule is silently wrong unless communication overlaps and is not batched.
        overlap_p2p_comm=interleaved and options.overlap_p2p,
        batch_p2p_comm=not (interleaved and options.overlap_p2p),
        use_cpu_initialization=platform.is_cpu,
        # Weights are always loaded; what the skipped initialisation would also have set is set by mark_tensor_parallel.
        perform_initialization=False,
        # Transformer Engine's layers are told by build_trainable: said here, the output layer would ask for Apex.
        gradient_accumulation_fusion=paths.gradient_accumulation_fusion and not transformer_engine,
        masked_softmax_fusion=False,
        bias_activation_fusion=paths.bias_activation_fusion,
        persist_layer_norm=False,
        # Transformer Engine's kernel turns a packed row in one go; without it see rotary.py.
        apply_rope_fusion=transformer_engine,
        recompute_granularity="full" if options.recompute == "full" else None,
        recompute_method="uniform" if options.recompute == "full" else None,
        recompute_num_layers=1 if options.recompute == "full" else None,
        **_expert_arguments(shape, paths),
    )


def _expert_arguments(shape: ModelShape, paths: FastPaths) -> dict:
    if not shape.experts:
        return {}
    return dict(
        num_moe_experts=shape.experts,
        moe_ffn_hidden_size=shape.expert_ffn,
        moe_router_topk=shape.experts_per_token,
        # Softmax over all experts first, then top-k; renormalised over the chosen ones where the checkpoint says so.
        moe_router_pre_softmax=not shape.norm_topk_prob,
        moe_router_score_function="softmax",
        # The objective alone is minimised: no load-balancing loss beside it.
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_grouped_gemm=paths.grouped_experts,
        moe_permute_fusion=paths.moe_permute_fusion,
        moe_router_dtype="fp32",
    )


def layer_spec(shape: ModelShape, config: TransformerConfig, transformer_engine: bool, vp_stage: int | None):
    """The block spec: Transformer Engine's layers, or the local ones with our norm and core attention."""
    common = dict(
        num_experts=shape.experts or None, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=shape.qk_norm
    )
    if transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec(**common)
    layer = get_gpt_layer_local_spec(**common, normalization="RMSNorm")
    parts = layer.submodules
    parts.input_layernorm = RMSNorm
    parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = CausalCoreAttention
    if shape.qk_norm:
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm
    # Given per layer, Megatron-Core takes the final norm from here too (a bare layer spec would bring its own, which
    # refuses sequence parallelism).
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=RMSNorm
    )


def build_model(
    shape: ModelShape,
    layout: ParallelLayout,
    options: ModelOptions,
    platform: Platform,
    position: RankPosition,
    seed: int = 0,
):
    """GPTModel chunks of this rank (one, or ``virtual_pipeline`` of them), with uninitialised weights, on the
    platform's device.

    Load weights before use: nothing is initialised at random here.
    """
    if options.dtype not in DTYPES:
        raise ValueError(f"model.dtype={options.dtype!r} is not known: use {' or '.join(DTYPES)}")
    model_parallel_cuda_manual_seed(seed)
    config = transformer_config(shape, layout, options, platform)
    transformer_engine = uses_transformer_engine(options, platform)
    compat.choose_router_product(transformer_engine)
    chunk_count = layout.virtual_pipeline if layout.interleaved else 1
    chunks = []
    for stage in range(chunk_count):
        vp_stage = stage if chunk_count > 1 else None
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=layer_spec(shape, config, transformer_engine, vp_stage),
            vocab_size=padded_vocab(shape.vocab, layout.tensor, options.vocab_multiple),
            max_sequence_length=shape.max_positions,
            pre_process=position.pipeline_rank == 0 and stage == 0,
            post_process=position.is_last_stage and stage == chunk_count - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=shape.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=shape.rope_base,
            vp_stage=vp_stage,
        )
        chunk.rotary_pos_emb = PositionRotary(shape.head_dim, 1.0, use_cpu_initialization=platform.is_cpu)
        # The checkpoint's own frequencies, whatever its rotary scheme.
        chunk.rotary_pos_emb.inv_freq = torch.tensor(
            shape.inverse_frequencies, dtype=torch.float32, device=platform.device
        )
        mark_tensor_parallel(chunk)
        chunk.to(platform.device)
        if config.bf16:
            chunk = Float16Module(config, chunk)
        chunks.append(chunk)
    return chunks


def mark_tensor_parallel(chunk: GPTModel) -> None:
    """Marks the parameters that are split over tensor ranks.

    Megatron-Core marks them while it initialises weights. Without the mark the gradient norm counts a split parameter
    on tensor rank 0 only, and clipping is silently wrong.
    """
    # Transformer Engine takes the grouped experts' weights for whole ones: Megatron-Core splits them without telling
    # it.
    for name, parameter in chunk.named_parameters():
        dim = grouped_dim(name)
        if dim is not None:
            parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, 1
    for module in chunk.modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)):
            parameters = [(module.weight, 0), (getattr(module, "bias", None), 0)]
        elif isinstance(module, RowParallelLinear):
            parameters = [(module.weight, 1)]
        else:
            continue
        for parameter, dim in parameters:
            if parameter is not None and not getattr(parameter, "tensor_model_parallel", False):
                parameter.tensor_model_parallel = True
                parameter.partition_dim = dim
                parameter.partition_stride = 1


def unwrap(chunk) -> GPTModel:
    """The GPTModel inside DistributedDataParallel and Float16Module."""
    while not isinstance(chunk, GPTModel):
        chunk = chunk.module
    return chunk


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW as the DCPO paper runs it. ``lr`` is the first step's; each update is given its own."""

    name: str = "adam"  # adam | sgd
    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    distributed: bool = True
    # auto | on | off, see fast_paths.py
    overlap_grad_reduce: str = "auto"
    overlap_param_gather: str = "auto"
    bucket_parameters: int | None = (
        None  # that travel at a time where communication overlaps; None: Megatron-Core's own
    )


def build_trainable(chunks, options: OptimizerOptions, platform: Platform, fuse_gradient_accumulation: bool = False):
    """Wraps ``chunks`` in DistributedDataParallel and makes Megatron-Core's (distributed) optimizer for them.

    Returns ``(wrapped chunks, optimizer)``. Weights must be loaded already: the optimizer copies its fp32 main weights
    from them.

    Raises:
        ValueError: an overlap that is demanded and cannot be had.
    """
    config = unwrap(chunks[0]).config
    # Megatron-Core shards the state of Adam only; plain SGD has none to shard.
    distributed = options.distributed and options.name == "adam"
    overlap_grad_reduce, overlap_param_gather, problems = choose_overlap(
        options.overlap_grad_reduce, options.overlap_param_gather, distributed, platform
    )
    if problems:
        raise ValueError("; ".join(problems))
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed,
        overlap_grad_reduce=overlap_grad_reduce,
        overlap_param_gather=overlap_param_gather,
        bucket_size=options.bucket_parameters,
    )
    if fuse_gradient_accumulation:
        for module in (module for chunk in chunks for module in chunk.modules()):
            if hasattr(module, "fuse_wgrad_accumulation"):  # a layer of Transformer Engine
                module.fuse_wgrad_accumulation = True
    wrapped = [
        DistributedDataParallel(config=config, ddp_config=ddp_config, module=chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = [c.no_sync for c in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer=options.name,
            lr=options.lr,
            min_lr=0.0,
            adam_beta1=options.betas[0],
            adam_beta2=options.betas[1],
            adam_eps=options.eps,
            sgd_momentum=0.0,
            weight_decay=options.weight_decay,
            clip_grad=options.clip_grad,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=distributed,
            overlap_param_gather=overlap_param_gather,
        ),
        wrapped,
        use_gloo_process_groups=False,
    )
    # Norms and biases are not decayed. Megatron-Core only notes that (wd_mult); its own training loop's scheduler
    # applies it, and there is none here.
    for group in optimizer.param_groups:
        group["weight_decay"] = options.weight_decay * group.get("wd_mult", 1.0)
    config.grad_scale_func = optimizer.scale_loss
    return wrapped, optimizer
