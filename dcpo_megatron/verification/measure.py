"""The rank side of the certificate: real GPTModel, DistributedDataParallel, DistributedOptimizer, schedule and DCPO
loss, in one layout.

:func:`measure` runs inside a :class:`~dcpo_megatron.verification.ranks.RankPool` on every rank of the layout; rank 0
gives back everything under Hugging Face names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib

import torch
import torch.distributed as dist

from dcpo_megatron.advantages import RewardHistory
from dcpo_megatron.objectives import Objective, aggregation_weights
from dcpo_megatron.verification.cases import TEMPERATURE, VISITS, ZERO_PROMPT, Item, visit_rewards
from dcpo_megatron.verification.layouts import Layout


def measure(
    layout: Layout,
    folder: str,
    items: list[Item],
    objectives: dict[str, Objective],
    *,
    rates: dict[str, float],
    adam: dict,
    dtype: str = "float32",
    transformer_engine: str = "off",
    device: str = "cpu",
    sabotage: str | None = None,
) -> dict | None:
    """Loss and gradients under each objective, log-probs and entropies, parameters after one step of each optimizer
    under the last objective.

    Args:
        rates: learning rate by optimizer. "adam" runs Megatron-Core's DistributedOptimizer, "sgd" its plain optimizer
            (the distributed one knows Adam only).
        adam: "betas", "eps", "weight_decay", "clip_grad" of the Adam steps (two of them; SGD makes one, with neither
            decay nor clipping).
        dtype, transformer_engine: as in the model's options.
        sabotage: ``package.module:function`` called before the model is built, to break one thing on purpose; it
            returns what undoes it.

    Returns:
        on rank 0 ``{"loss": {objective: float}, "gradients": {objective: {name: tensor}}, "logprobs": [...],
        "entropies": [...], "norm": {optimizer: float}, "parameters": {optimizer: {name: tensor}}, "adam_gradients": one
        dict a step, "history": state, "history_is_one": bool, "replicas_agree": bool}``; None elsewhere. Log-probs and
        entropies come twice: lowest and highest of all ranks.
    """
    from dcpo_megatron.mcore.hf_config import read_shape
    from dcpo_megatron.mcore.layout import ParallelLayout, make_groups, rank_position
    from dcpo_megatron.mcore.platform import select_platform

    exact_products()
    parallel = ParallelLayout(**layout.parallel)
    shape = read_shape(folder)
    problems = parallel.problems(shape, layout.world)
    if problems:
        raise ValueError("; ".join(problems))
    make_groups(parallel)
    undo = None
    if sabotage:
        module, _, name = sabotage.partition(":")
        undo = getattr(importlib.import_module(module), name)()
    try:
        from dcpo_megatron.mcore.model import ModelOptions, OptimizerOptions
        from dcpo_megatron.mcore.step import PolicyModel
        from dcpo_megatron.weights.transfer import WeightGatherer, load_hf_weights

        result: dict = {
            "loss": {},
            "gradients": {},
            "norm": {},
            "parameters": {},
            "adam_gradients": [],
            "replicas_agree": True,
        }
        for optimizer, lr in rates.items():
            model = PolicyModel.create(
                shape,
                parallel,
                ModelOptions(dtype=dtype, transformer_engine=transformer_engine),
                select_platform(device),
                rank_position(),
                temperature=TEMPERATURE,
                packed=layout.packed,
                head_chunk_tokens=16,  # several chunks, the last one short
            )
            load_hf_weights(model, folder)
            extra = adam if optimizer == "adam" else {"weight_decay": 0.0, "clip_grad": 0.0}
            model.make_trainable(OptimizerOptions(name=optimizer, lr=lr, **extra))
            gatherer = WeightGatherer(model)
            plan = split_items(items, layout, model.position)
            if not result["loss"]:
                result["logprobs"], result["entropies"] = _distributions(model, plan, items)
                for name, objective in objectives.items():
                    sums, _ = model.gradients(_micro_batches(plan, items, objective), objective)
                    _gather_gradient_shards(model)
                    result["loss"][name] = sums["loss"]
                    result["gradients"][name] = _collect(gatherer.tensors(main_grad, torch.float32))
            for step in range(2 if optimizer == "adam" else 1):
                if optimizer == "adam":
                    model.gradients(_micro_batches(plan, items, objective), objective)
                    _gather_gradient_shards(model)
                    result["adam_gradients"].append(_collect(gatherer.tensors(main_grad, torch.float32)))
                update = model.update(_micro_batches(plan, items, objective), objective, lr)
                if not update.stepped:
                    raise RuntimeError(f"{optimizer} left its step {step + 1} out: a gradient is not finite")
                if step == 0:
                    result["norm"][optimizer] = update.gradient_norm
            result["parameters"][optimizer] = _collect(gatherer.tensors())
            result["replicas_agree"] &= _replicas_agree(model, result["parameters"][optimizer])
        result["history"], result["history_is_one"] = _reward_history(items, model.position)
    finally:
        if undo:
            undo()
    return result if dist.get_rank() == 0 else None


def exact_products() -> None:
    """fp32 products in fp32 from here on. TF32 has ten bits, and NVIDIA's images switch it on for torch
    (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE)."""
    torch.set_float32_matmul_precision("highest")


def _reward_history(items: list[Item], position) -> tuple[dict, bool]:
    """SAS over the data-parallel group: three visits with groups split over its ranks. Returns the state, and whether
    EVERY rank has it bit for bit."""
    from dcpo_megatron.distributed import all_gather_bytes

    history = RewardHistory()
    for visit in range(VISITS):
        ids, rewards = visit_rewards(items, visit)
        mine = slice(position.data_rank, None, position.data_size)
        history.observe(ids[mine], torch.tensor(rewards[mine], dtype=torch.float64), position.data_group)
    state = history.state_dict()
    bits = repr({k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in sorted(state.items())}).encode()
    everyone = all_gather_bytes(bits, dist.group.WORLD, torch.device("cuda" if dist.get_backend() == "nccl" else "cpu"))
    return state, len(set(everyone)) == 1


def _replicas_agree(model, full: dict[str, torch.Tensor]) -> bool:
    """Whether every rank, walking its own tensor-, pipeline- and data-parallel peers, sees the same bits, and both
    copies of a tied embedding are one."""
    from dcpo_megatron.distributed import all_gather_bytes

    device = model.platform.device
    digest = hashlib.sha256()
    for name in sorted(full):
        digest.update(full[name].numpy().tobytes())
    agree = len(set(all_gather_bytes(digest.digest(), dist.group.WORLD, device))) == 1
    position = model.position
    if model.shape.tied_embeddings and position.pipeline_size > 1:
        last = model.modules[-1]
        first = model.modules[0]
        weight = first.embedding.word_embeddings.weight if first.pre_process else None
        if weight is None:
            weight = last.output_layer.weight if position.is_last_stage else torch.empty(0, device=device)
        mine = weight.detach().float().cpu().numpy().tobytes()
        copies = set(all_gather_bytes(mine, position.pipeline_group, device)) - {b""}
        agree = agree and len(copies) == 1
    verdict = torch.tensor([int(agree)], device=device)
    dist.all_reduce(verdict, op=dist.ReduceOp.MIN)
    return bool(verdict.item())


def _collect(tensors) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().float().cpu().clone() for name, tensor in tensors}


def _micro_batches(plan: list[list[int]], items: list[Item], objective: Objective):
    return [[_sequence(number, items, objective) for number in batch] for batch in plan]


def main_grad(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The gradient as the optimizer takes it, fp32."""
    return parameter.main_grad


def split_items(items: list[Item], layout: Layout, position) -> list[list[int]]:
    """Micro-batches of this data-parallel rank, by item number: groups split over ranks, very different lengths
    together, a micro-batch of zero advantages alone, and (where there are enough) one without any response."""
    zero = [number for number, item in enumerate(items) if item.prompt_id == ZERO_PROMPT]
    rest = [number for number, item in enumerate(items) if item.prompt_id != ZERO_PROMPT]
    mine_zero = zero[position.data_rank :: position.data_size]
    mine = rest[position.data_rank :: position.data_size]
    if layout.micro_batches == 1:
        return [mine + mine_zero]
    batches = [mine_zero]
    others = layout.micro_batches - 1
    if others >= 3:
        # Uneven on purpose: the last rank has one micro-batch with nothing in it.
        empty = 1 if position.data_rank == position.data_size - 1 else 0
        batches += [mine[i :: others - empty] for i in range(others - empty)] + [[] for _ in range(empty)]
    else:
        batches += [mine[i::others] for i in range(others)]
    return batches


def _sequence(number: int, items: list[Item], objective: Objective):
    from dcpo_megatron.mcore.batch import TrainingSample

    item = items[number]
    weights = aggregation_weights(
        objective.aggregation,
        torch.tensor([len(i.response) for i in items]),
        torch.tensor([i.prompt_id for i in items]),
        max_response_tokens=64,
    )
    return TrainingSample(
        number=number,
        prompt_ids=item.prompt,
        response_ids=item.response,
        advantage=item.advantage,
        weight=float(weights[number]),
        old_logprobs=item.old_logprobs,
        rollout_logprobs=item.rollout_logprobs,
        reference_logprobs=item.reference_logprobs if objective.kl_coef else None,
    )


def _distributions(model, plan, items) -> tuple[list, list]:
    """``([lowest, highest], [lowest, highest])`` log-probs and entropies of every item over all ranks that hold it
    (peers must agree)."""
    objective = Objective()
    micro_batches = _micro_batches(plan, items, objective)
    found = []
    for entropy in (False, True):
        local = model.logprobs(micro_batches, entropy=entropy)
        extremes = []
        for fill, op in ((float("inf"), dist.ReduceOp.MIN), (float("-inf"), dist.ReduceOp.MAX)):
            rows = [local.get(n, torch.full((len(item.response),), torch.nan)) for n, item in enumerate(items)]
            flat = torch.cat(rows).nan_to_num(nan=fill).to(model.platform.device)
            dist.all_reduce(flat, op=op)
            extremes.append([part.cpu() for part in flat.split([len(item.response) for item in items])])
        found.append(extremes)
    return found[0], found[1]


def _gather_gradient_shards(model) -> None:
    """After the reduce-scatter each data-parallel rank holds its shard of every gradient bucket: joins them in place,
    for reading only."""
    for chunk in model.chunks:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            for bucket in buffer.buckets:
                group = (
                    bucket.data_parallel_group if hasattr(bucket, "data_parallel_group") else buffer.data_parallel_group
                )
                size = dist.get_world_size(group)
                if size == 1:
                    continue
                data = bucket.grad_data
                shard = data.chunk(size)[dist.get_rank(group)].clone()
                dist.all_gather_into_tensor(data, shard, group=group)


def objective_settings(objective: Objective, max_response_tokens: int = 64) -> dict:
    """The fields of an objective for the dense reference."""
    return dataclasses.asdict(objective) | {"max_response_tokens": max_response_tokens}
