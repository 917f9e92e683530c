"""Functions that run on the ranks of a pool: stock Megatron-Core saves and loads checkpoints here, with no code of the
project that touches one."""

import multiprocessing
import os

import torch
import torch.distributed as dist


def _may_have_children() -> None:
    # Megatron-Core's writer starts a process of its own, which the pool's daemon processes may not.
    multiprocessing.current_process()._config["daemon"] = False


def megatron_version() -> str:
    """The version of the package that is imported here."""
    import megatron.core

    return megatron.core.__version__


def _policy(hf: str, parallel: dict, dtype: str, transformer_engine: str = "off"):
    from dcpo_megatron.mcore.hf_config import read_shape
    from dcpo_megatron.mcore.layout import ParallelLayout, make_groups, rank_position
    from dcpo_megatron.mcore.model import ModelOptions
    from dcpo_megatron.mcore.platform import select_platform
    from dcpo_megatron.mcore.step import PolicyModel

    layout = ParallelLayout(**parallel)
    make_groups(layout)
    options = ModelOptions(dtype=dtype, transformer_engine=transformer_engine)
    return PolicyModel.create(read_shape(hf), layout, options, select_platform("cpu"), rank_position())


def _sharded(policy) -> dict:
    return {f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(policy.modules)}


def load_and_save_by_megatron(
    hf: str, source: str, destination: str, parallel: dict, dtype: str, transformer_engine: str = "off"
) -> None:
    """Stock ``dist_checkpointing`` loads ``source`` into a model of any layout and saves it again."""
    from megatron.core import dist_checkpointing

    _may_have_children()
    policy = _policy(hf, parallel, dtype, transformer_engine)
    for chunk in policy.modules:
        for parameter in chunk.parameters():
            torch.nn.init.constant_(parameter, float("nan"))
    loaded = dist_checkpointing.load(_sharded(policy), source)
    for number, chunk in enumerate(policy.modules):
        chunk.load_state_dict(loaded[f"model{number}"])
    if dist.get_rank() == 0:
        os.makedirs(destination)
    dist.barrier()
    dist_checkpointing.save(_sharded(policy), destination)


def weights_loaded_by_us(hf: str, checkpoint: str, parallel: dict) -> dict[str, torch.Tensor]:
    """The Hugging Face tensors of a model of any layout that the trainer's own loader filled."""
    from dcpo_megatron.weights.transfer import WeightGatherer, load_weights

    policy = _policy(hf, parallel, "float32")
    load_weights(policy, checkpoint)
    return {name: tensor.clone() for name, tensor in WeightGatherer(policy).tensors()}


# -- plain Megatron-Core: model, optimizer and checkpoint built from its own parts alone -----------


def _plain_model(tensor: int, pipeline: int, experts: bool, expert: int):
    from megatron.core import parallel_state as mpu
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16 forgets it where Transformer Engine is not installed
    mpu.initialize_model_parallel(tensor, pipeline, expert_model_parallel_size=expert)
    model_parallel_cuda_manual_seed(7)
    torch.manual_seed(7)
    moe = dict(
        num_moe_experts=4, moe_ffn_hidden_size=24, moe_router_topk=2, moe_router_pre_softmax=False,
        expert_model_parallel_size=expert,
        moe_token_dispatcher_type="alltoall", moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0,
    )  # fmt: skip
    config = TransformerConfig(
        num_layers=4, hidden_size=32, num_attention_heads=4, num_query_groups=2, kv_channels=16 if experts else 8,
        ffn_hidden_size=48,
        normalization="RMSNorm", layernorm_epsilon=1e-6, add_bias_linear=False, add_qkv_bias=not experts,
        qk_layernorm=experts,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, hidden_dropout=0.0, attention_dropout=0.0,
        init_method_std=0.2,
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False, bias_activation_fusion=False, masked_softmax_fusion=False,
        persist_layer_norm=False,
        **(moe if experts else {}),
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(
        normalization="RMSNorm", num_experts=4 if experts else None, moe_grouped_gemm=False, qk_layernorm=experts
    )
    return GPTModel(
        config, spec, vocab_size=128 * tensor, max_sequence_length=128, position_embedding_type="rope",
        rotary_base=10000,
        pre_process=mpu.is_pipeline_first_stage(), post_process=mpu.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
    )  # fmt: skip


def plain_save(
    destination: str, tensor: int, pipeline: int, experts: bool = False, expert: int = 1, metadata: dict | None = None
) -> None:
    """A model as Megatron-Core makes and initialises it, saved as Megatron-Core saves it."""
    from megatron.core import dist_checkpointing

    _may_have_children()
    model = _plain_model(tensor, pipeline, experts, expert)
    if dist.get_rank() == 0:
        os.makedirs(destination)
    dist.barrier()
    sharded = {"model": model.sharded_state_dict(metadata=metadata), "iteration": 11}
    dist_checkpointing.save(sharded, destination)


def plain_logits(
    checkpoint: str, token_ids: list[int], experts: bool = False, metadata: dict | None = None
) -> torch.Tensor:
    """Logits ``[tokens, vocabulary]`` of the checkpoint, loaded into one process by Megatron-Core."""
    from megatron.core import dist_checkpointing

    model = _plain_model(1, 1, experts, 1)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    sharded = {"model": model.sharded_state_dict(metadata=metadata)}
    model.load_state_dict(dist_checkpointing.load(sharded, checkpoint)["model"])
    model.eval()
    ids = torch.tensor([token_ids])
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    with torch.no_grad():
        return model(ids, torch.arange(ids.shape[1])[None], mask)[0].float()


def plain_training_state(
    source: str | None, destination: str, tensor: int, pipeline: int, sharding: str = "fully_reshardable"
) -> None:
    """A model with Adam's state, after a step on made-up gradients or as loaded from ``source``, saved in a layout."""
    from megatron.core import dist_checkpointing
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    _may_have_children()
    model = _plain_model(tensor, pipeline, False, 1)
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(model.config, ddp_config, model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-2, params_dtype=torch.float32, use_distributed_optimizer=True),
        [wrapped],
    )
    metadata = {"distrib_optim_sharding_type": sharding}

    def sharded(is_loading: bool) -> dict:
        state = {"model": model.sharded_state_dict()}
        state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=is_loading, metadata=metadata)
        return state

    import dcpo_megatron.mcore.compat  # noqa: F401 - stock Megatron-Core cannot load this format with PyTorch's Adam

    for parameter in model.parameters():
        parameter.main_grad.copy_(torch.randn_like(parameter.main_grad))
    # Also before loading: with PyTorch's Adam, Megatron-Core asks for the state's step, which a fresh optimizer does
    # not have.
    for _ in range(2 if source is None else 1):
        optimizer.step()
    if source is not None:
        loaded = dist_checkpointing.load(sharded(True), source)
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
    if dist.get_rank() == 0:
        os.makedirs(destination)
    dist.barrier()
    dist_checkpointing.save(sharded(False), destination)
